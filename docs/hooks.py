"""What the website adds to Markdown and docstrings: a table of all knobs, and names in docstrings without brackets."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

CONFIG = Path(__file__).parents[1] / "hf_curriculum_distill/config/distillation.py"
MARKER = "<!-- the knobs -->"


def on_page_markdown(markdown: str, **_) -> str:
    return markdown.replace(MARKER, "\n".join(tables(CONFIG.read_text()))) if MARKER in markdown else markdown


def on_page_content(html: str, **_) -> str:
    # docstrings name what they refer to as transformers' do: [`Name`] and [`~module.Name`]
    return re.sub(r"\[<code>~?([\w.]+?\.)?(\w+)</code>\]", r"<code>\2</code>", html)


def tables(source: str) -> Iterator[str]:
    """The fields of the configuration as Markdown tables, one for each comment that heads a group of them."""
    headings = {n: line.strip("# ") for n, line in enumerate(source.splitlines(), 1) if re.match(r"    # Param", line)}
    fields = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.AnnAssign)]
    done = 0
    for field in fields:
        for number in [number for number in headings if done < number < field.lineno]:
            title = re.sub("^Parameters that control |^Parameters whose default differs", "", headings[number])
            title = f"defaults that differ{title}" if title.startswith(" from") else title
            yield from ["", f"## {title[0].upper()}{title[1:]}", "", "| option | default | |", "|---|---|---|"]
        done = field.lineno
        given = {keyword.arg: keyword.value for keyword in field.value.keywords}
        says = "".join(ast.literal_eval(given["metadata"])["help"]).replace("|", "\\|")
        yield f"| `{field.target.id}` | `{ast.unparse(given['default'])}` | {says} |"
