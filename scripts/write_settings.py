"""Writes docs/settings.md: every setting with its default and what it is, from `config.py`.

python scripts/write_settings.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from lorashear.config import CompressSettings

TARGET = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """# All settings

Written by `scripts/write_settings.py` from `src/lorashear/config.py`. How to set them: [using.md](using.md). A default of
*none* is chosen by the program, as the description says.
"""


def settings_page() -> str:
    """The page, as Markdown."""
    top, groups = CompressSettings(), []
    plain = [name for name in CompressSettings.model_fields if not isinstance(getattr(top, name), BaseModel)]
    groups.append(_table("The run", None, top, plain))
    for name in CompressSettings.model_fields:
        group = getattr(top, name)
        if isinstance(group, BaseModel):
            groups.append(_table(f"`{name}`", name, group, [*type(group).model_fields]))
    return HEAD + "".join(groups)


def _table(title: str, prefix: str | None, group: BaseModel, names: list[str]) -> str:
    about = " ".join((type(group).__doc__ or "").split()) + "\n\n" if prefix else ""
    rows = "\n".join(_rows(prefix, group, names))
    return f"\n## {title}\n\n{about}| setting | default | |\n|---|---|---|\n{rows}\n"


def _rows(prefix: str | None, group: BaseModel, names: list[str]) -> Iterator[str]:
    for name in names:
        field = type(group).model_fields[name]
        text = " ".join((field.description or "").split()).replace("|", "\\|")
        default = getattr(group, name)
        shown = "*none*" if default is None else f"`{default}`"
        yield f"| `{prefix + '.' if prefix else ''}{name}` | {shown} | {text} |"


if __name__ == "__main__":
    TARGET.write_text(settings_page(), encoding="utf-8")
