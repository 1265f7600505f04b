"""What the site has beyond the Markdown files of docs/. mkdocs calls the `on_` functions, see mkdocs.yml.

- A line `::: nsattn.name` becomes the signature and the docstring of that object, `::: table support` the support table
  of `nsattn.dispatch`, `::: table times` and `::: table models` those of attention.json and models.json in
  benchmarks/results/h200, `::: table models_compiled` that of models_compiled.json, `::: table head_dims` one from
  selected.json, `::: table times_h100` and `::: table models_h100` those in h100.
- Pages from outside docs/ (`PAGES`) are part of the site.
- Links go to files of the repository. Those that are no page of the site are copied into it.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from nsattn import dispatch
from nsattn.bench import model, selected, summary

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md",
    "examples/train_hf/README.md", "examples/quality/README.md", "examples/passkey/README.md",
    "benchmarks/results/h200/verify.md", "benchmarks/results/h200/repeat.md", "benchmarks/results/h200/counters.md",
    "benchmarks/results/h200/passkey/passkey.md", "benchmarks/results/h200/sanitizer.md",
    "benchmarks/results/h100/verify.md", "benchmarks/results/h100/sanitizer.md",
)  # fmt: skip
TABLES = {
    "support": dispatch.support_table,
    "times": lambda: summary(RESULTS / "h200" / "attention.json"),
    "models": lambda: model.summary(RESULTS / "h200" / "models.json"),
    "models_compiled": lambda: model.summary(RESULTS / "h200" / "models_compiled.json"),
    "head_dims": lambda: selected.head_dims(RESULTS / "h200" / "selected.json"),
    "times_h100": lambda: summary(RESULTS / "h100" / "attention.json"),
    "models_h100": lambda: model.summary(RESULTS / "h100" / "models.json"),
}
DIRECTIVE = re.compile(r"^::: (.+)$", re.M)
LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    for path in PAGES:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    here = page.file.src_uri
    source = here if here in PAGES else f"docs/{here}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (ROOT / target).is_file():
            return match[0]  # mkdocs reports it
        uri = target.removeprefix("docs/")
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(ROOT / target)))
        return match[1] + posixpath.relpath(uri, posixpath.dirname(here) or ".")

    return LINK.sub(link, DIRECTIVE.sub(lambda match: directive(match[1]), markdown))


def directive(text: str) -> str:
    """Markdown for what stands after `:::`."""
    kind, _, name = text.rpartition(" ")
    return TABLES[name]() if kind == "table" else reference(name)


def reference(path: str) -> str:
    """Markdown of a module's docstring, or of a function or class: heading, signature, docstring, methods."""
    try:
        return docstring(importlib.import_module(path))
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        thing = getattr(importlib.import_module(module), name)
    parts = [f"## `{name}`", signature(name, thing), docstring(thing)]
    if inspect.isclass(thing):
        for key, method in vars(thing).items():
            if inspect.isfunction(method) and not key.startswith("_") and method.__doc__:
                parts += [f"### `{name}.{key}`", signature(f"{name}.{key}", method), docstring(method)]
    return "\n\n".join(parts)


def signature(name: str, thing: Any) -> str:
    if hasattr(thing, "_fields"):  # a NamedTuple: its fields, with their comments
        body = inspect.getsource(thing).split("    def ")[0].split("    @")[0]
        lines = [line for line in body.split('"""')[-1].splitlines() if line.strip()]
        return "```text\n" + "\n".join(line.strip() for line in lines) + "\n```"
    parameters = list(inspect.signature(thing).parameters.values())
    lines = [re.sub(r": '(.*?)'", r": \1", f"    {p},") for p in parameters if p.name != "self"]
    star = next((i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if star is not None:
        lines.insert(star - sum(p.name == "self" for p in parameters), "    *,")
    # inspect writes a class as its address or its path
    text = "\n".join(re.sub(r"NSAConfig\(.*\),$", "NSAConfig(),", line) for line in lines)
    return f"```text\n{name}(\n{text}\n)\n```" if lines else f"```text\n{name}()\n```"


def docstring(thing: Any) -> str:
    """A docstring as Markdown: headings of one or two words (`Args:`), their indented lists, indented code."""
    out: list[str] = []
    section = False
    lines = re.sub(r"(?<=\n\n)(    .*\n(?:    .*\n|\n(?=    ))*)", fenced, (inspect.getdoc(thing) or "") + "\n")
    code = False
    for line in lines.splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        entry = re.match(r"([\w, ]+): (.*)", text)
        if code or text.startswith("```"):
            code ^= text.startswith("```")
            out.append(line)
        elif not indent:
            heading = re.match(r"([A-Z]\w*(?: \w+)?):( |$)(.*)", text)
            section = bool(heading and not heading[3])
            if heading:
                out += ["", f"**{heading[1]}:** {escape(heading[3])}", ""][: 3 if section else 2]
            else:
                out.append(escape(text))
        elif section and indent == 4 and entry:
            out.append("- " + ", ".join(f"`{n.strip()}`" for n in entry[1].split(",")) + f": {escape(entry[2])}")
        elif section and re.match(r"`\w+`(, \(|:)", text):
            out.append(f"    - {escape(text)}")
        else:
            out.append((" " * min(indent, 4) if section and out[-1].lstrip().startswith("-") else "") + escape(text))
    return "\n".join(out).strip()


def fenced(match: re.Match[str]) -> str:
    """Indented code, marked as such."""
    return "```python\n" + re.sub(r"^    ", "", match[1], flags=re.M).rstrip() + "\n```\n"


def escape(text: str) -> str:
    """Markdown's special characters outside of code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*_\[\]])", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)
