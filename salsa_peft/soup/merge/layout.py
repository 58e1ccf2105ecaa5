"""The files of a merge: the base's own headers, index and configuration where nothing in them changes, else made anew."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

from salsa_peft.soup.checkpoints.read import text_part
from salsa_peft.soup.merge.plan import Plan
from salsa_peft.utils.safetensors_io import BITS, make_header


class Layout:
    """What is written around the tensors of a plan."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.source = plan, plan.source
        self.same = {
            file: entries
            == [(name, self.source.dtype(name), self.source.shape(name)) for name in self.source.names(file)]
            for file, entries in plan.layout.items()
        }

    def header(self, file: str) -> bytes:
        """Of a shard."""
        if self.same[file]:
            return self.source.header(file)
        return make_header(self.plan.layout[file], self.source.checkpoint.files[file].metadata or None)

    def size_of(self, file: str) -> int:
        """Bytes of a shard."""
        if self.same[file]:
            return self.source.size_of(file)
        return (
            8
            + len(self.header(file))
            + sum(math.prod(shape) * BITS[dtype] // 8 for _, dtype, shape in self.plan.layout[file])
        )

    def parameters(self) -> int:
        """In all tensors."""
        return sum(math.prod(shape) for entries in self.plan.layout.values() for _, _, shape in entries)

    def names(self, file: str) -> Iterator[str]:
        """Tensors of a shard, in order."""
        return (name for name, _, _ in self.plan.layout[file])

    def index(self) -> bytes | str:
        """model.safetensors.index.json."""
        given = self.source.index()
        content = json.loads(given)
        shards = {name: file for file in self.plan.layout for name in self.names(file)}
        total = sum(self.size_of(file) - len(self.header(file)) - 8 for file in self.plan.layout)
        if content["weight_map"] == shards and content.get("metadata", {}).get("total_size") == total:
            return given
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(shards.items()))}, indent=2) + "\n"
        )

    def config(self) -> bytes | str:
        """config.json, with the rows of the embeddings and whether they are tied."""
        rows, untied = self.plan.loaded.rows, self.plan.untied
        given = self.source.config()
        if rows is None and untied is None:
            return given
        content = json.loads(given)
        parts = [content, *([content["text_config"]] if text_part(content) else [])]
        if rows is not None:
            (parts[-1] if "vocab_size" not in content else content)["vocab_size"] = rows
            if "vocab_size" in parts[-1]:
                parts[-1]["vocab_size"] = rows
        for part in parts if untied else ():
            part["tie_word_embeddings"] = False
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
