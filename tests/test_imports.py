"""Which modules may import which, and what an import may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_files import random_params, write_folder

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "triton", "transformers")


def imported_modules(code: str) -> set[str]:
    """Return what is loaded after running `code` in a fresh interpreter, without the tests' hooks."""
    probe = f"{code}\nimport sys; print('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def imports_of(path: Path, package: str) -> set[str]:
    """Return the absolute names of all modules imported anywhere in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            found.add(".".join([*parents, *([node.module] if node.module else [])]))
    return found


def test_import_llama_loads_nothing_heavy():
    loaded = imported_modules("import llama")
    assert not loaded & {*HEAVY, "numpy", "tokenizers", "jinja2"}
    assert not imported_modules("import llama; llama.reference; llama.LlamaTokenizerFast") & set(HEAVY)
    assert not imported_modules("import llama.cli") & {*HEAVY, "numpy"}


def test_the_reference_imports_numpy_and_nothing_of_ours():
    for path in (ROOT / "reference").glob("*.py"):
        for name in imports_of(path, "llama.reference"):
            top = name.partition(".")[0]
            if name.startswith("llama.reference") or top in sys.stdlib_module_names or top in ("numpy", "jaxtyping"):
                continue
            assert (path.name, name) == ("loading.py", "llama.checkpoints"), f"{path.name} imports {name}"


def test_kernels_import_nothing_of_ours():
    for path in (ROOT / "kernels").glob("*.py"):
        for name in imports_of(path, "llama.kernels"):
            assert not name.startswith("llama") or name.startswith("llama.kernels"), f"{path.name} imports {name}"


def test_reading_a_checkpoint_needs_no_torch(tmp_path):
    folder = write_folder(tmp_path / "model", random_params())
    assert not imported_modules(f"import llama; llama.reference.load({str(folder)!r})") & set(HEAVY)


def test_the_folders_are_linked_and_kernels_is_no_package():
    for name in ("reference", "kernels", "benchmarks"):
        link = ROOT / "llama" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
    assert not (ROOT / "kernels" / "__init__.py").exists()
    # Run from the repository's root, transformers must not mistake our folder for Hugging Face's package `kernels`.
    imported_modules("import transformers.models.llama.modeling_llama")


def test_names_are_found_and_typos_are_not():
    import llama

    assert set(llama.__all__) <= set(dir(llama))
    assert llama.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="module 'llama' has no attribute 'LlamaTokeniser'"):
        _ = llama.LlamaTokeniser
    with pytest.raises(AttributeError, match=r"module 'llama\.generation' has no attribute 'LogitsProcesser'"):
        _ = llama.generation.LogitsProcesser


def test_what_generation_is_made_of_is_found_where_transformers_has_it():
    import transformers

    import llama.generation
    from llama.generation import processors, stopping, streamers

    for module in (processors, stopping, streamers):
        for name, found in vars(module).items():
            if getattr(found, "__module__", None) == module.__name__ and hasattr(transformers.generation, name):
                assert getattr(llama, name) is getattr(llama.generation, name) is found
                assert {name} <= set(llama.__all__) & set(llama.generation.__all__) & set(dir(llama.generation))
    assert llama.GenerationMixin is llama.generation.GenerationMixin
    assert llama.PreTrainedTokenizerFast is llama.LlamaTokenizerFast
    assert "torch" not in imported_modules("import llama; llama.GenerationConfig")
