"""The announced load hook: `import linearize` loads nothing, and `from_pretrained` finds the hook anyway."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from linearize.checkpoint import announce

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = Path(__file__).with_name("written_by_0_1") / "llama"

# All that `import linearize` needs beside the standard library.
ALONE = """
import sys
before = set(sys.modules)
import linearize
dir(linearize)
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(tops - set(sys.stdlib_module_names)))
"""
LOADS = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({checkpoint!r}, local_files_only=True)
print([name for name, _ in model.named_parameters() if "linear_attention" in name][0])
"""
ORDERS = {
    "linearize first": "import linearize",
    "transformers first": "import transformers; import linearize",
    "its quantizers first": "import transformers.quantizers.auto; import linearize",
    "probed, imported and reloaded": """
import importlib, importlib.util
import linearize
importlib.util.find_spec("transformers.quantizers.auto")
import transformers.quantizers.auto
importlib.reload(transformers.quantizers.auto)
assert "linearize" in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
""",
}


def python(code: str) -> str:
    """The standard output of a new interpreter that runs `code` on this checkout."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_linearize_loads_neither_torch_nor_transformers() -> None:
    assert python(ALONE).split() == ["lazy_loader", "linearize"]


# The others are what every test of checkpoints does, in a process that has imported everything.
UNUSUAL = {"probed, imported and reloaded"}


@pytest.mark.parametrize(
    "order", [pytest.param(o, marks=() if o in UNUSUAL else pytest.mark.slow) for o in ORDERS]
)
def test_from_pretrained_restores_a_converted_checkpoint_in_any_order_of_imports(order: str) -> None:
    said = python(ORDERS[order] + LOADS.format(checkpoint=str(CHECKPOINT)))
    assert "self_attn.linear_attention" in said


# ------------------------------------------------------------------------------------------------ the finder


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ModuleType]]:
    """The announced module is `announced_module`; each registering of the hook adds it to the list."""
    name = "announced_module"
    (tmp_path / f"{name}.py").write_text("import time\ntime.sleep(0.05)\nDONE = True\n")
    found: list[ModuleType] = []

    def register() -> None:
        assert sys.modules[name].DONE
        found.append(sys.modules[name])

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(announce, "QUANTIZERS", name)
    monkeypatch.setattr(announce, "_register", register)
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, announce._Finder)])
    yield found
    sys.modules.pop(name, None)


def load() -> ModuleType:
    return importlib.import_module("announced_module")


def test_the_hook_is_registered_after_the_module_has_run_and_at_each_reload(registered: list) -> None:
    announce.announce()
    announce.announce()
    assert not registered
    module = load()
    assert registered == [module]
    importlib.reload(module)
    assert registered == [module, module]


def test_the_loaded_module_shows_no_trace_of_the_finder(registered: list) -> None:
    announce.announce()
    module = load()
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert "DONE = True" in inspect.getsource(module)


def test_one_that_only_looks_can_read_the_source_and_loses_nothing(registered: list) -> None:
    announce.announce()
    spec = importlib.util.find_spec("announced_module")
    assert spec is not None and "DONE" in spec.loader.get_source("announced_module")
    assert not registered
    load()
    assert len(registered) == 1


def test_an_import_that_fails_is_announced_again(registered: list, tmp_path: Path) -> None:
    announce.announce()
    file = tmp_path / "announced_module.py"
    text = file.read_text()
    file.write_text("raise RuntimeError('not yet')")
    with pytest.raises(RuntimeError, match="not yet"):
        load()
    assert not registered
    file.write_text(text + "# another size, so that no cached code is taken\n")
    importlib.invalidate_caches()
    load()
    assert len(registered) == 1


def test_a_module_that_is_there_already_is_registered_with_at_once(registered: list) -> None:
    module = load()
    assert not registered
    announce.announce()
    assert registered == [module]


def test_finders_that_ask_all_others_do_not_go_round_in_circles(registered: list) -> None:
    class Asking:
        """As import hooks of other packages do it: whoever is asked asks all others."""

        busy = False

        def find_spec(self, name: str, path: object = None, target: object = None) -> object:
            if self.busy:
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    class Around:
        """Hides each finder behind one of its own."""

        def __init__(self, finder: object) -> None:
            self.find_spec = finder.find_spec

    announce.announce()
    sys.meta_path.insert(0, Asking())
    sys.meta_path.append(Asking())
    sys.meta_path[:] = map(Around, sys.meta_path)
    announce.announce()  # does not know its own finder again
    load()
    assert registered


def test_threads_that_import_at_once_get_one_module_with_the_hook(registered: list) -> None:
    announce.announce()
    start = threading.Barrier(8)
    seen: list[int] = []

    def work(index: int) -> None:
        start.wait()
        if index % 2:
            importlib.util.find_spec("announced_module")
        load()
        seen.append(len(registered))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1] * 8  # nobody had the module before it had the hook


def test_a_module_that_does_not_exist_is_not_found(registered: list, tmp_path: Path) -> None:
    (tmp_path / "announced_module.py").unlink()
    announce.announce()
    with pytest.raises(ModuleNotFoundError):
        load()
