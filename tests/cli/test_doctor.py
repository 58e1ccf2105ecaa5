"""`salsa doctor`: what is there, what is wrong, and never the token."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, hub
from paths import ROOT

from salsa_peft.cli import doctor
from salsa_peft.cli import main as cli
from salsa_peft.cli.doctor import Finding
from salsa_peft.recipe import cache as runs
from salsa_peft.utils.files import locked, write_atomic
from salsa_peft.utils.fingerprints import sha256
from salsa_peft.utils.manifests import MANIFEST

CANARY = "hf_CanaryThatMustNotBeSeen0123456789"


def found(check: Any) -> dict[str, Finding]:
    """A check's findings by name."""
    return {finding.name: finding for finding in check()}


def asked(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    """The Hub's check alone, in a process that knows that environment."""
    code = "from salsa_peft.cli import doctor\nfor one in doctor.hub(): print(repr(tuple(one)))"
    words = words or (sys.executable, "-c", code)
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)


class TestTheCommand:
    def test_a_machine_without_faults(self, capsys: Any, monkeypatch: Any, tmp_path: Path) -> None:
        """Each check has its say, and code 0."""
        monkeypatch.chdir(tmp_path)
        assert cli.main(["doctor"]) == 0
        said = capsys.readouterr().out
        lines = said.splitlines()
        assert lines[-1] == "no problems" and not [line for line in lines if line.startswith("!")]
        for name in (
            "python",
            "torch",
            "trl",
            "peft",
            "bitsandbytes",
            "CPU",
            "memory",
            "disk, results",
            "attention",
            "4 bits",
            "Hub",
        ):
            assert any(line.startswith(f"  {name} ") for line in lines), name
        assert f"  torch              {importlib.metadata.version('torch')}" in lines
        assert "auto is sdpa" in said and "HF_HUB_OFFLINE is set" in said and not list(tmp_path.iterdir())

    def test_what_is_wrong_is_said_again_at_the_end(self, capsys: Any, monkeypatch: Any) -> None:
        """With what to do, and code 1."""
        two = {
            "one": lambda: iter([Finding("good", "4")]),
            "two": lambda: iter([Finding("bad", "5", "Take 6")]),
        }
        monkeypatch.setattr(doctor, "CHECKS", two)
        assert cli.main(["doctor"]) == 1
        assert capsys.readouterr().out.splitlines() == [
            "  good               4", "! bad                5", "", "1 problem:", "  bad: 5. Take 6",
        ]  # fmt: skip

    def test_a_check_that_fails_is_a_finding(self, capsys: Any, monkeypatch: Any) -> None:
        """The others are looked at all the same; what a URL holds of a login is not shown."""

        def broken() -> Iterator[Finding]:
            yield Finding("proxy", f"http://me:{CANARY}@proxy:8080", f"expected https://{CANARY}@host")
            raise OSError(f"no such thing\nat https://me:{CANARY}@host/x")

        monkeypatch.setattr(doctor, "CHECKS", {"first": broken, "second": lambda: iter([Finding("good", "4")])})
        assert cli.main(["doctor"]) == 1
        said = capsys.readouterr().out
        assert (
            CANARY not in said
            and "! proxy              http://…@proxy:8080" in said
            and "  good               4" in said
        )
        assert "! first              OSError: no such thing at https://…@host/x" in said

    def test_a_checkout_that_is_not_installed(self, monkeypatch: Any) -> None:
        """It says where it runs from, and holds nothing against versions that it does not know."""

        def missing(name: str) -> Any:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "requires", missing)
        rows = found(doctor.versions)
        assert list(rows) == ["python", "salsa-peft"] and rows["salsa-peft"].found.endswith("salsa_peft")

    def test_a_folder_that_is_no_run(self, capsys: Any, tmp_path: Path) -> None:
        """One line, code 2, at once."""
        assert cli.main(["doctor", str(tmp_path)]) == 2
        assert (
            capsys.readouterr().err == f"{tmp_path}: not a run's folder, since it has no recipe.yaml; check the path\n"
        )
        assert cli.main(["doctor", "NONSENSE"]) == 2
        assert (
            capsys.readouterr().err == "NONSENSE: no such folder; name a run's folder, such as runs/quickstart-lora\n"
        )
        assert cli.main(["doctor", "x" * 300]) == 2 and capsys.readouterr().err.count("\n") == 1

    def test_each_check_says_what_it_is_for(self) -> None:
        """In its docstring."""
        assert all(check.__doc__ for check in doctor.CHECKS.values())


class TestPackages:
    def test_another_version_than_it_was_made_for(self, monkeypatch: Any) -> None:
        """Named with the range, and the command that mends it."""
        real = importlib.metadata.version
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.12.0" if name == "trl" else real(name))
        trl = found(doctor.versions)["trl"]
        assert trl.found == "1.12.0" and trl.advice is not None
        assert ">=1.16" in trl.advice and "<2" in trl.advice and trl.advice.count("pip install 'trl") == 1

    def test_one_that_is_missing(self, monkeypatch: Any) -> None:
        """Of those it needs it is wrong; of those it can do without it is said."""
        real = importlib.metadata.version

        def version(name: str) -> str:
            if name in ("peft", "bitsandbytes"):
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        assert found(doctor.versions)["peft"].advice == "Install it: pip install 'peft>=0.21'"
        assert found(doctor.extras)["bitsandbytes"] == Finding(
            "bitsandbytes", "not installed (--lora qlora, paged optimizers: pip install 'salsa-peft[qlora]')"
        )

    def test_one_that_cannot_be_imported(self, monkeypatch: Any) -> None:
        """As where its parts do not fit one another."""
        monkeypatch.setitem(sys.modules, "datasets", None)
        (broken,) = list(doctor.libraries())
        assert broken.name == "import datasets" and "ModuleNotFoundError" in broken.found and broken.advice is not None


class TestMachine:
    def test_a_gpu_that_pytorch_does_not_see(self, monkeypatch: Any, tmp_path: Path) -> None:
        """The driver names it; a CPU build of PyTorch can't use it."""
        command = tmp_path / "nvidia-smi"
        command.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA H200, 143771'\n")
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        (gpu,) = list(doctor.devices())
        assert gpu.advice is not None and " does not see NVIDIA H200: install a CUDA build" in gpu.advice

    def test_little_room(self, monkeypatch: Any) -> None:
        """Each place is named."""
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 2**40 - 2**30, 2**30))
        places = found(doctor.disk)
        assert list(places) == ["disk, results", "disk, Hub's cache", "disk, temporary"]
        for place in places.values():
            assert place.found.startswith("1.0 GiB free for /") and place.advice is not None
            assert "needs at least 5 GiB" in place.advice

    def test_a_folder_that_cannot_be_written_to(self, monkeypatch: Any) -> None:
        """And which option chooses another."""
        monkeypatch.setattr(os, "access", lambda *_: False)
        assert [place.advice and place.advice.split("(")[1] for place in doctor.disk()] == [
            "--output-dir)",
            "HF_HOME)",
            "TMPDIR)",
        ]

    def test_bitsandbytes_that_does_not_work(self, monkeypatch: Any) -> None:
        """Its own error in a line."""
        from bitsandbytes import functional

        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no kernel image\nis available")

        monkeypatch.setattr(functional, "quantize_4bit", broken)
        (row,) = list(doctor.four_bits())
        assert row.found == "RuntimeError: no kernel image is available" and row.advice is not None


class TestHub:
    @pytest.fixture
    def server(self) -> Iterator[Any]:
        with hub(CANARY) as made:
            yield made

    def test_who_is_logged_in(self, server: Any, tmp_path: Path) -> None:
        """Name and rights; the token goes to the Hub in its header and is seen nowhere else."""
        done = asked(server.environment(tmp_path))
        assert "'login', 'tester, token write'" in done.stdout and f"'Hub', '{server.url} answers in" in done.stdout
        assert CANARY not in done.stdout + done.stderr
        assert [request.path for request in server.requests if "authorization" in request.headers][
            -1
        ] == "/api/whoami-v2"

    def test_a_token_that_the_hub_does_not_know(self, server: Any, tmp_path: Path) -> None:
        """Wrong, and what to do."""
        server.token = "another"
        done = asked(server.environment(tmp_path) | {"HF_TOKEN": CANARY})
        assert (
            "('login', 'the Hub answers 401', 'The Hub does not know this token; run `hf auth login` again')"
            in done.stdout
        )
        assert CANARY not in done.stdout + done.stderr

    def test_no_token_and_no_answer(self, server: Any, tmp_path: Path) -> None:
        """No login is no fault; no answer is one, and a token is then not tried."""
        environment = server.environment(tmp_path)
        del environment["HF_TOKEN"]
        assert "('login', 'none: public repositories only;" in asked(environment).stdout
        server.faults.append(Fault("HEAD", "/api/models", 0, times=20))
        done = asked(server.environment(tmp_path))
        assert "cannot be reached (" in done.stdout and "set HF_HUB_OFFLINE=1" in done.stdout
        assert (
            "there is a token, but it could not be checked" in done.stdout and CANARY not in done.stdout + done.stderr
        )

    def test_a_proxy_in_between(self, server: Any, tmp_path: Path) -> None:
        """Its answer is not the Hub's."""
        server.faults.append(Fault("HEAD", "/api/models", 407, times=20))
        assert (
            "answers 407', 'Look for a proxy or login page between this machine and the Hub"
            in asked(server.environment(tmp_path)).stdout
        )

    def test_a_hub_out_of_order(self, server: Any, tmp_path: Path) -> None:
        """A 503 is said as that."""
        server.faults.append(Fault("HEAD", "/api/models", 503, times=20))
        assert "answers 503', 'The Hub has a problem; try again later'" in asked(server.environment(tmp_path)).stdout

    def test_the_token_is_not_among_the_variables(self, monkeypatch: Any) -> None:
        """Nor any other secret."""
        monkeypatch.setenv("HF_TOKEN", CANARY)
        monkeypatch.setenv("OPENAI_API_KEY", CANARY)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        rows = found(doctor.environment)
        assert rows["OMP_NUM_THREADS"].found == "3" and CANARY not in repr(rows)


class TestARun:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        """Two results and one that was begun."""
        run = tmp_path / "run"
        for name, key in (("soup", "0" * 12), ("sft/seed-0", "1" * 12), ("ppo/salsa", "2" * 12)):
            folder = run / name / key
            write_atomic(folder / runs.BEGUN, "{}")
            write_atomic(folder / "weights.bin", b"weights")
            if name != "ppo/salsa":
                (folder / runs.BEGUN).unlink()
                files = {"weights.bin": {"size": 7, "sha256": sha256(folder / "weights.bin")}}
                write_atomic(folder / MANIFEST, json.dumps({"files": files}))
        write_atomic(run / "recipe.yaml", "name: x\n")
        return run

    def test_what_is_whole_and_what_is_not(self, run: Path, monkeypatch: Any, capsys: Any) -> None:
        """A flipped bit is named; nothing is written."""
        monkeypatch.setattr(doctor, "CHECKS", {})
        assert cli.main(["doctor", str(run)]) == 0
        assert "ppo/salsa/222222222222 unfinished: run the recipe again to finish it" in capsys.readouterr().out
        (run / "soup" / ("0" * 12) / "weights.bin").write_bytes(b"weighss")
        before = sorted(run.rglob("*"))
        assert cli.main(["doctor", str(run)]) == 1
        said = capsys.readouterr().out
        assert (
            "! soup/000000000000  changed: weights.bin" in said
            and "Run the recipe again to replace the result of soup" in said
        )
        assert "  sft/seed-0/111111111111 complete, 0.0 MB" in said and sorted(run.rglob("*")) == before

    def test_a_manifest_that_cannot_be_read(self, run: Path) -> None:
        """It is named, not taken for none."""
        (run / "soup" / ("0" * 12) / MANIFEST).write_text("{")
        rows = {row.name: row for row in doctor.run_results(run)}
        assert rows["soup/000000000000"].found == "manifest.json cannot be read" and rows["soup/000000000000"].advice

    def test_who_works_on_it(self, run: Path) -> None:
        """As long as he does."""
        with locked(run):
            rows = {row.name: row.found for row in doctor.run_results(run)}
            assert rows["lock"].startswith("host ") and f"pid {os.getpid()}, since " in rows["lock"]
            assert rows["ppo/salsa/222222222222"] == "in progress"
        assert next(iter(doctor.run_results(run))) == Finding("lock", "free")
        with contextlib.suppress(FileNotFoundError):
            (run / ".lock").unlink()
        assert next(iter(doctor.run_results(run))) == Finding("lock", "free")
