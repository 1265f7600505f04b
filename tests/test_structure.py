"""The architecture of docs and code: import arrows, equal signatures, equation tags, generated tables."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsattn
from nsattn import cli, dispatch
from nsattn.bench import summary
from nsattn.bench.model import ratios, read
from nsattn.bench.timing import read_rows

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nsattn"

# What each module may import of nsattn. Kernels: tile helpers, plan and config, and shared files with a leading _.
ARROWS = {
    "config": set(),
    "plan": {"config", "kernels._plan"},  # its own kernels, imported where they run
    "dispatch": set(),
    "checks": {"config", "plan"},
    "operators": set(),
    "branches": {"config", "dispatch", "operators", "plan", "kernels.reference", "kernels.rotate_triton"},
    "rotary": {"branches"},
    "api": {"branches", "checks", "dispatch", "config", "plan"},
    "checkpoint": {"branches"},
    "decode": {"api", "branches", "checks", "dispatch", "config"},
    "cache": {"checks", "config", "plan"},
    "nn": {"api", "cache", "checks", "config", "decode", "plan", "rotary"},
    "kernels.reference": {"config", "plan"},
}


def imports(path: Path) -> set[str]:
    """Modules of nsattn that a file imports, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "nsattn":
            base = node.module.removeprefix("nsattn").removeprefix(".")
            names = {alias.name for alias in node.names}
            submodules = {n for n in names if (PACKAGE / base.replace(".", "/") / f"{n}.py").exists()}
            found |= {f"{base}.{n}".lstrip(".") for n in submodules}
            if names - submodules:
                found.add(base)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("nsattn.") for a in node.names if a.name.split(".")[0] == "nsattn"}
    return found


@pytest.mark.parametrize("module", ARROWS)
def test_arrows(module):
    assert imports(PACKAGE / f"{module.replace('.', '/')}.py") <= ARROWS[module]


def test_kernels_do_not_import_each_other():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for name in imports(path):
            allowed = name in ("plan", "config") or name.startswith("kernels._")
            assert allowed, f"{path.name} imports {name}"


def test_signatures_are_equal_across_implementations():
    for operation, cells in dispatch.TABLE.items():
        for function in (operation, f"{operation}_bwd"):
            seen = {}
            for impl in cells:
                module = dispatch.load(operation, impl)
                if impl == "reference" and function.endswith("_bwd"):
                    continue  # autograd through the reference is the oracle
                if function in ("select_blocks_bwd", "nsa_decode_bwd"):
                    assert not hasattr(module, function)  # neither a selection nor decoding has a gradient
                    continue
                parameters = inspect.signature(getattr(module, function)).parameters.values()
                seen[impl] = [(p.name, p.kind) for p in parameters]
            assert len({tuple(s) for s in seen.values()}) <= 1, seen


def test_every_public_function_has_a_full_docstring():
    for name in nsattn.__all__:
        thing = getattr(nsattn, name)
        assert inspect.getdoc(thing), name
        if inspect.isfunction(thing) and thing.__module__ in ("nsattn.api", "nsattn.decode"):
            doc = inspect.getdoc(thing)
            assert re.match(r".*(Eq \d|Section \d)", doc.splitlines()[0]), name
            for section in ("Args:", "Returns:", "Raises:", "Numerics:", "Source:"):
                assert section in doc, f"{name} lacks {section}"


def test_every_kernel_says_what_one_program_computes():
    for path in (PACKAGE / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_no_transposed_accumulator_in_a_product():
    """Triton on Hopper miscompiles dot(trans(x), y) for an x that came out of a product (fla#640)."""
    for path in (PACKAGE / "kernels").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            from_dot = set()
            for node in ast.walk(function):
                if isinstance(node, (ast.Assign, ast.AugAssign)):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    made = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
                    calls = {ast.unparse(c.func) for c in ast.walk(node.value) if isinstance(c, ast.Call)}
                    if calls & {"dot", "tl.dot"} or made & from_dot:
                        from_dot |= {t.id for t in targets if isinstance(t, ast.Name)}
            for call in ast.walk(function):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("dot", "tl.dot"):
                    for arg in call.args:
                        text = ast.unparse(arg)
                        if text.startswith("tl.trans("):
                            inner = {n.id for n in ast.walk(arg) if isinstance(n, ast.Name)}
                            assert not inner & from_dot, f"{path.name}: {function.name}: {ast.unparse(call)}"


def test_banned_words_in_kernels():
    for path in (PACKAGE / "kernels").glob("*.py"):
        text = path.read_text()
        for word in ("make_block_ptr", ".item()", ".tolist()", "os.environ", "autotune"):
            assert word not in text, f"{path.name}: {word}"
        # Results of other atomics depend on the order in which they happen.
        assert set(re.findall(r"atomic_\w+", text)) <= {"atomic_or"}, path.name


def test_equations_resolve():
    """Each row of docs/equations.md names a public function, and the table of `nsattn info` agrees."""
    text = (ROOT / "docs" / "equations.md").read_text()
    for tag, _, operation in cli.EQUATIONS:
        assert inspect.isfunction(getattr(nsattn, operation))
        rows = [line for line in text.splitlines() if line.startswith("|") and f"`nsattn.{operation}`" in line]
        assert len(rows) == 1 and tag.split()[-1] in rows[0], operation
        for cell in dispatch.TABLE[operation].values():
            assert not cell.is_kernel or f"{cell.module}.py" in rows[0], (operation, cell.module)
    assert {operation for _, _, operation in cli.EQUATIONS} == set(dispatch.TABLE)


def test_readme_support_table_is_generated():
    text = (ROOT / "README.md").read_text()
    match = re.search(r"<!-- support table -->\n(.*?)\n<!-- end -->", text, re.S)
    assert match and match.group(1) == dispatch.support_table()


def test_readme_times_come_from_the_results():
    text = (ROOT / "README.md").read_text()
    match = re.search(r"<!-- times -->\n(.*?)\n<!-- end -->.*?\]\((benchmarks/results/[^)]+\.json)\)", text, re.S)
    assert match and match.group(1) == summary(ROOT / match.group(2))


def test_readme_decoding_times_come_from_the_results():
    ours, dense, ratio = re.search(
        r"CUDA graph: ([\d.]+) ms with `nsa_decode`,\n([\d.]+) ms dense \(cuDNN\), ([\d.]+) times",
        (ROOT / "README.md").read_text(),
    ).groups()  # type: ignore[union-attr]
    case = [r for r in read_rows(ROOT / "benchmarks/results/h200/decode.json")
            if (r.T, r.sequences, r.Hq, r.Hkv) == (8 * 65536, 8, 32, 8)]
    ms = {r.impl: r.ms for r in case}
    assert ours == f"{ms['triton graph']:.3f}" and dense == f"{ms['dense cudnn graph']:.3f}"
    assert ratio == f"{ms['dense cudnn graph'] / ms['triton graph']:.1f}"


def test_readme_speedups_of_models_come_from_the_results():
    text = re.search(r"layers of Llama-3-8B at 64K tokens.*?models_64x16.png", (ROOT / "README.md").read_text(), re.S)
    assert text
    said = re.findall(r"([\d.]+)(?= times|\sand [\d.]+ times)", text.group())
    shape = ("Llama-3-8B", 65536, 64)
    rows = [r for r in read(ROOT / "benchmarks/results/h200/models.json") if (r.model, r.T, r.B) == shape]
    phases = ("train", "prefill")
    found = [ratios(rows, slow, "auto", phase) for slow in ("dense", "qmajor", "nsa_ref") for phase in phases]
    assert said == [f"{ratio:.1f}" for (ratio,) in found]


def test_relative_links_exist():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_readme_example_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, cwd=ROOT, timeout=120)


def test_import_needs_torch_alone():
    """A fresh process without triton, typer and the training packages imports nsattn and runs the reference. Torch's
    compiler stays out: it takes a second."""
    code = """
import sys
for name in ("triton", "typer", "rich", "safetensors", "matplotlib", "transformers"):
    sys.modules[name] = None
import torch, nsattn
layer = nsattn.NSAttention(32, 4, 2, config=nsattn.NSAConfig(8, 4, 16, 4, 20))
layer(torch.randn(1, 40, 32)).sum().backward()
assert not [m for m in sys.modules if m.startswith("nsattn.kernels.") and m.endswith("_triton")]
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_kernel_modules_exist():
    for operation, cells in dispatch.TABLE.items():
        for impl, cell in cells.items():
            module = importlib.import_module(f"nsattn.kernels.{cell.module}")
            assert callable(getattr(module, operation)), (operation, impl)
