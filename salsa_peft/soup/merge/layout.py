"""Headers, index and configuration of a merged checkpoint: the base's if they fit, else new ones."""

import json
import math

from salsa_peft.soup.checkpoints.read import INDEX, text_part
from salsa_peft.soup.merge.plan import Plan
from salsa_peft.utils.safetensors_io import BITS, make_header


class Layout:
    """Headers, index, configuration and sizes of the files that a plan writes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.headers: dict[str, bytes] = {}
        for name, entries in plan.layout.items():
            file = plan.source.checkpoint.files[name]
            same = entries == [(tensor, entry.dtype, entry.shape) for tensor, entry in file.entries.items()]
            self.headers[name] = file.header if same else make_header(entries, file.metadata or None)
        tensors = [(dtype, math.prod(shape)) for entries in plan.layout.values() for _, dtype, shape in entries]
        self.parameters = sum(count for _, count in tensors)
        self.tensor_bytes = sum(count * BITS[dtype] // 8 for dtype, count in tensors)
        self.size = self.tensor_bytes + sum(8 + len(header) for header in self.headers.values())

    def index(self) -> bytes | str:
        """The content of model.safetensors.index.json."""
        given = (self.plan.source.checkpoint.folder / INDEX).read_bytes()
        content = json.loads(given)
        shards = {name: file for file, entries in self.plan.layout.items() for name, _, _ in entries}
        if content["weight_map"] == shards and content.get("metadata", {}).get("total_size") == self.tensor_bytes:
            return given
        new = {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(shards.items()))}
        return json.dumps(new, indent=2) + "\n"

    def config(self) -> bytes | str:
        """The content of config.json: the base's, with a new vocab_size or tie_word_embeddings if needed."""
        rows, untied = self.plan.loaded.rows, self.plan.untied
        given = self.plan.source.config()
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
