"""`salsa docs`: the recipe's keys, one by one, by section, or all of them as the Markdown of docs/recipes.md."""

import sys
import textwrap
from collections.abc import Iterator, Sequence

from salsa_peft.config.keys.describe import NAME, Key, all_keys, find_key, flow, near_keys
from salsa_peft.utils.console import Parser, complain
from salsa_peft.utils.messages import one_line

HEADER = """# Keys of a recipe

This page is made by `salsa docs --markdown` of the classes in `salsa_peft/config/`; `salsa docs KEY` prints a key, and
`salsa docs SECTION` a section. A recipe states only what differs from these defaults. Layers, each over the one before:
defaults, recipe file, `--lora`'s preset, the recipe's `lora` section, `--set KEY=VALUE`. `NAME` stands for a name of
your choice."""
WIDTH = 118
OWN = "this project"
"""Source of defaults that come from no paper or library."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command `salsa docs`. Returns 0, or 2 for a key that a recipe does not have."""
    parser = Parser(
        prog="salsa docs",
        description="Explain a recipe's keys: type, unit, default, source, example.",
        epilog="Without KEY: the sections.",
    )
    parser.add_argument("keys", nargs="*", metavar="KEY", help="a key such as ppo.kl_coef, or a section such as ppo")
    parser.add_argument("--markdown", action="store_true", help="print all keys as Markdown (docs/recipes.md)")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.markdown:
        print(markdown())
        return 0
    return max([show(name) for name in args.keys] or [show_sections()])


def show(name: str) -> int:
    """Print a key, or a section and its keys. Returns the exit code."""
    key = find_key(name.partition("=")[0])
    if key is None:
        near = near_keys(name)
        hint = f"did you mean {' or '.join(near)}?" if near else "`salsa docs` lists the sections"
        complain(f"salsa docs: {one_line(name)}: a recipe has no such key; {hint}")
        return 2
    if inner := _inside(key):
        _show_table(key, inner)
    if not key.is_section:
        print("\n".join(describe(key)))
    return 0


def describe(key: Key) -> list[str]:
    """The lines about a key: what it sets, then its facts."""
    facts = {
        "type": key.type, "unit": key.unit or ("none" if key.numeric else ""), "default": key.default, "source": key.source or OWN,
        "example": f"{key.as_yaml}   in a recipe",
    }  # fmt: skip
    text = textwrap.fill(key.text, _width() - 2, initial_indent="  ", subsequent_indent="  ")
    lines = [key.name, *text.splitlines()]
    for name, value in facts.items():
        if value:
            indent = " " * 12
            lines += textwrap.wrap(f"  {name:<10}{value}", _width(), subsequent_indent=indent, break_long_words=False)
    if NAME not in key.name:
        lines.append(f"{'':12}--set '{key.name}={flow(key.example)}'   on the command line")
    return lines


def show_sections() -> int:
    """Print every section with the first sentence about it, and the keys outside sections."""
    outer = [key for key in all_keys().values() if "." not in key.name]
    sections = [key for key in outer if _inside(key)]
    _table([[key.name, _first_sentence(key)] for key in sections])
    print()
    _table([[f"{key.name} = {key.default}", _first_sentence(key)] for key in outer if key not in sections])
    print("\n`salsa docs ppo` shows a section, `salsa docs ppo.kl_coef` a key.")
    return 0


def _show_table(section: Key, inner: Sequence[Key]) -> None:
    print(textwrap.fill(f"{section.name}: {section.text}", _width()) + "\n")
    _table([[f"{key.name} = {key.default}" if key.default else key.name, _first_sentence(key)] for key in inner])
    print(f"\n`salsa docs {inner[0].name}` shows a key with its type, unit, source and an example.")


def _inside(section: Key) -> list[Key]:
    return [key for key in all_keys().values() if key.name.startswith(f"{section.name}.")]


def _first_sentence(key: Key) -> str:
    sentence, dot, rest = key.text.partition(". ")
    return f"{sentence}{dot.strip()}" if rest else sentence


def _width() -> int:
    from rich.console import Console

    return min(Console().width, WIDTH)


def _table(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=_width() // 2, overflow="fold")
    table.add_column()
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=_width()).print(table)


def markdown() -> str:
    """All keys as Markdown: a heading for each section, a list entry for each key."""
    return "\n".join([HEADER, *_markdown_lines()])


def _markdown_lines() -> Iterator[str]:
    outer = [key for key in all_keys().values() if "." not in key.name]
    plain = [key for key in outer if not _inside(key)]
    for title, keys in [
        ("Outside sections", plain),
        *((key.name, [key, *_inside(key)]) for key in outer if _inside(key)),
    ]:
        yield f"\n## {title}\n"
        for key in keys:
            yield from _entry(key)


def _entry(key: Key) -> Iterator[str]:
    """The list entry of a key; for a section at the top, its text."""
    text = key.text.replace("<", "&lt;").replace("*", "\\*")
    if key.is_section and "." not in key.name:
        yield textwrap.fill(
            f"{text} Key `{key.name}`: {key.type}{f', default `{key.default}`' if key.default else ''}.", WIDTH
        )
        yield ""
        return
    facts = [key.type, "required" if key.default == "required" else f"default `{key.default}`"]
    facts += [f"unit: {key.unit}"] if key.unit else []
    source = f" Source: {key.source}." if key.source else ""
    example = "" if key.is_section else f" Example: `{key.as_yaml}`"
    yield textwrap.fill(
        f"- `{key.name}` ({'; '.join(facts)}). {text}{source}{example}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.exit(main())
