"""The monitor in other frameworks, and what it looks like."""

import ast
import importlib
import importlib.util
import io
import json
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from tests.fake_gpu import FakeGPU
from torchfast import VRAMMonitor, integrations
from torchfast._monitor.html import gauge
from torchfast.integrations._repeat import repeating


def finished() -> VRAMMonitor:
    """Return a monitor after a run of two phases, on a GPU whose every number is known."""
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        for _ in range(5):
            with vram.phase("<forward>"):
                gpu.now_s += 1
                gpu.allocate(400)
                vram.sample()
            with vram.phase("backward"):
                gpu.allocate(-300)
                vram.sample()
    return vram


class TestLooks:
    """The HTML of gauge, timeline and table."""

    def test_it_is_well_formed_self_contained_and_escaped(self) -> None:
        """No script, no link to anywhere, every tag closed, and a phase's name cannot become a tag."""
        html = finished()._repr_html_()
        root = ET.fromstring(html)  # noqa: S314 - our own text
        tags = {element.tag for element in root.iter()}
        assert "script" not in tags
        assert {"svg", "polyline", "polygon", "table"} <= tags
        assert not {name for element in root.iter() for name in element.attrib if name in ("src", "href")}
        assert "http" not in html
        assert "&lt;forward&gt;" in html

    def test_the_bar_is_to_scale(self) -> None:
        """Each part's width is its share of the total, side by side, and the peak is where it belongs."""
        root = ET.fromstring(gauge(finished().status()))  # noqa: S314 - our own text
        rects = [rect for rect in root.iter("rect") if rect.get("fill") != "currentColor"]
        widths = [float(str(rect.get("width")).rstrip("%")) for rect in rects]
        assert widths == [5.0, 4.0, 1.0, 3.0, 5.0]
        edges = [float(str(rect.get("x")).rstrip("%")) for rect in rects]
        assert edges == [0.0, 5.0, 9.0, 10.0, 13.0]
        (peak,) = [rect for rect in root.iter("rect") if rect.get("fill") == "currentColor"]
        assert peak.get("x") == "8.000%"

    def test_the_peak_is_on_the_timeline_though_no_sample_saw_it(self) -> None:
        """The scale reaches up to the exact peak, which lies above every sample."""
        gpu = FakeGPU()
        gpu.others_bytes = 0
        with gpu.monitor() as vram:
            gpu.allocate(4000)
            gpu.allocate(-4000)
        (svg,) = [e for e in ET.fromstring(vram._repr_html_()).iter("svg") if e.get("viewBox")]  # noqa: S314
        (dashed,) = [line for line in svg.iter("line") if line.get("stroke-dasharray")]
        assert 0 < float(str(dashed.get("y1"))) < 178

    def test_a_finished_run_is_shown_as_it_was(self) -> None:
        """A notebook's output, shown again after the run, is that of the run's end."""
        gpu = FakeGPU()
        with gpu.monitor() as vram:
            gpu.allocate(100)
        gpu.allocate(5000)
        assert "tensors 100 B" in vram._repr_html_()
        assert "4.98 KiB" not in vram._repr_html_()

    def test_the_gauge_takes_a_record_from_elsewhere(self) -> None:
        """A status that went through JSON, as from a training in another process, gives the same gauge."""
        status = finished().status()
        assert gauge(json.loads(json.dumps(status))) == gauge(status)

    def test_what_is_unknown_is_not_drawn(self) -> None:
        """Outside and others that cannot be told apart are one part; an unknown fragment is none."""
        status = finished().status() | {"outside_bytes": None, "others_bytes": None, "fragmented_bytes": None}
        html = gauge(status)
        assert "not PyTorch 800 B" in html
        assert "outside" not in html
        assert "fragmented" not in html

    def test_a_lower_bound_is_said(self) -> None:
        """A peak that may be higher is shown as such."""
        status = finished().status()
        status["peak"]["is_lower_bound"] = True
        assert "at least 800 B" in gauge(status)

    def test_on_a_cpu_the_host_is_drawn(self) -> None:
        """Without a GPU the gauge and the timeline show the host's memory."""
        with VRAMMonitor("cpu", interval_s=None) as vram:
            vram.sample()
        html = vram._repr_html_()
        assert "cpu, host memory" in html
        assert "host process" in html

    def test_where_nothing_is_known(self) -> None:
        """With neither GPU nor /proc the gauge says that it knows nothing."""
        status = finished().status() | {"total_bytes": None, "host_total_bytes": None}
        assert "memory unknown" in gauge(status)

    def test_before_a_run_the_gauge_alone_is_shown(self) -> None:
        """A monitor that has not run yet has no timeline and no phases to show."""
        html = FakeGPU().monitor()._repr_html_()
        assert "polyline" not in html
        assert "<table" not in html
        assert "tensors 0 B" in html


def test_tensorboard(tmp_path: Path) -> None:
    """What is known becomes scalars in GiB, of the step they belong to; what is not is left out."""
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    from torchfast.integrations.tensorboard import write_vram

    with SummaryWriter(str(tmp_path)) as writer:
        write_vram(writer, finished(), step=3)
        with VRAMMonitor("cpu", interval_s=None) as vram:
            write_vram(writer, vram, step=4, tag="cpu")
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    (scalar,) = events.Scalars("vram/tensors_gib")
    assert (scalar.step, scalar.value) == (3, pytest.approx(500 / 2**30))
    assert {"vram/others_gib", "vram_peak/allocated_gib", "vram_phase/backward_gib"} <= set(tags)
    assert "cpu/tensors_gib" not in tags


def test_prometheus() -> None:
    """A scrape reads anew, labels by device and kind, and leaves out what is not known."""
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry, generate_latest

    from torchfast.integrations.prometheus import VRAMCollector

    registry = CollectorRegistry()
    gpu = FakeGPU()
    with gpu.monitor() as vram:
        registry.register(VRAMCollector(vram))
        with vram.phase("forward"):
            gpu.allocate(500)
        text = generate_latest(registry).decode()
        assert 'torchfast_memory_bytes{device="cuda:0",kind="tensors"} 500.0' in text
        assert 'torchfast_memory_peak_bytes{device="cuda:0",kind="allocated"} 500.0' in text
        assert 'torchfast_phase_peak_bytes{device="cuda:0",phase="forward"} 500.0' in text
        assert 'torchfast_ooms_total{device="cuda:0"} 0.0' in text
        gpu.allocate(-400)
        assert 'kind="tensors"} 100.0' in generate_latest(registry).decode()
    registry = CollectorRegistry()
    registry.register(VRAMCollector(VRAMMonitor("cpu")))
    assert 'kind="tensors"' not in generate_latest(registry).decode()


GRADIO = """
import json
import gradio
from tests.test_integrations import finished
from torchfast.integrations.gradio import vram_gauge

vram = finished()
with gradio.Blocks():
    here = vram_gauge(vram, every_s=0.5, label="VRAM")
    elsewhere = vram_gauge(lambda: json.loads(json.dumps(vram.status())))
    nobody = vram_gauge(lambda: None)
assert isinstance(here, gradio.HTML)
texts = [component.load_event_to_attach[0]() for component in (here, elsewhere, nobody)]
print(json.dumps(texts))
"""


@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="Gradio is not installed")
def test_gradio() -> None:
    """The gauge is an HTML component on a timer, of a monitor or of a function's status record."""
    # In a process of its own: importing Gradio leaves event loops open, and warnings are errors here.
    run = subprocess.run([sys.executable, "-c", GRADIO], capture_output=True, text=True, check=True)
    here, elsewhere, nobody = json.loads(run.stdout)
    assert "tensors 500 B" in here
    assert here == elsewhere
    assert nobody == "no training is running"


class Terminal(io.StringIO):
    """A stream that renews its lines."""

    def isatty(self) -> bool:
        """Say that it is a terminal."""
        return True


def test_the_line_in_a_terminal_renews_itself() -> None:
    """In a terminal the line is written over; a longer one's rest is wiped; a newline ends it."""
    from torchfast.integrations.terminal import live_line

    gpu = FakeGPU()
    written = threading.Event()

    class Renewed(Terminal):
        def flush(self) -> None:
            if self.getvalue().count("\r") >= 2:
                written.set()

    stream = Renewed()
    with gpu.monitor() as vram, live_line(vram, every_s=0.001, stream=stream):
        gpu.allocate(1000)
        assert written.wait(30)
        gpu.allocate(-1000)
    *before, last = stream.getvalue().split("\r")
    assert len(before) >= 2
    assert last.startswith("VRAM 0 B, peak 1000 B")
    assert last.endswith("\n")
    assert len(last.rstrip("\n")) >= len(before[-1])


def test_the_line_in_a_log_file_is_written_once() -> None:
    """Where lines cannot be renewed, only the last one is written."""
    from torchfast.integrations.terminal import live_line

    stream = io.StringIO()
    with FakeGPU().monitor() as vram, live_line(vram, every_s=0.001, stream=stream):
        pass
    assert stream.getvalue().count("\n") == 1
    assert "\r" not in stream.getvalue()


class Broken(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, _: str) -> int:
        """Fail."""
        raise BrokenPipeError


class BrokenTerminal(Broken, Terminal):
    """A terminal that has gone."""


@pytest.mark.parametrize("stream", [Broken, BrokenTerminal])
def test_a_stream_that_breaks_ends_no_training(stream: type[io.StringIO]) -> None:
    """It becomes a warning, which, where warnings are errors, does not replace an error of the block's."""
    from torchfast.integrations.terminal import live_line

    with (
        FakeGPU().monitor() as vram,
        pytest.warns(RuntimeWarning, match="live view stopped"),
        live_line(vram, every_s=100, stream=stream()),
    ):
        pass
    with FakeGPU().monitor() as vram, pytest.raises(LookupError), live_line(vram, stream=stream()):
        raise LookupError


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_the_last_line_is_written_after_an_error_too(stream: type[io.StringIO]) -> None:
    """It says how much memory there was when the training ended."""
    from torchfast.integrations.terminal import live_line

    out = stream()
    with FakeGPU().monitor() as vram, pytest.raises(LookupError), live_line(vram, every_s=100, stream=out):
        raise LookupError
    assert out.getvalue().strip().startswith("VRAM 0 B")
    assert out.getvalue().endswith("\n")


def test_the_notebook_view_renews_one_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor is displayed once, and that display is renewed while the block runs and at its end."""
    pytest.importorskip("IPython")
    from torchfast.integrations import notebook

    renewed = threading.Event()
    shown: list[Any] = []

    class Handle:
        def update(self, vram: VRAMMonitor) -> None:
            shown.append(vram)
            renewed.set()

    def display(vram: VRAMMonitor, *, display_id: bool) -> Handle:
        assert display_id
        shown.append(vram)
        return Handle()

    monkeypatch.setattr(notebook, "display", display)
    with FakeGPU().monitor() as vram, notebook.live_view(vram, every_s=0.001):
        assert renewed.wait(30)
    assert len(shown) >= 3
    assert all(one is vram for one in shown)


def test_the_notebook_view_outside_of_a_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    """In a plain interpreter nothing can be renewed: the monitor is printed and the block runs."""
    pytest.importorskip("IPython")
    from torchfast.integrations.notebook import live_view

    with FakeGPU().monitor() as vram, live_view(vram):
        ran = True
    assert ran
    assert "VRAMMonitor of cuda:0" in capsys.readouterr().out


def test_a_display_that_breaks_does_not_break_the_training() -> None:
    """An error while showing ends the showing with a warning; the block goes on."""
    asked = threading.Event()

    def fail() -> None:
        asked.set()
        raise OSError("no terminal")

    block = repeating(fail, 0.001)
    with pytest.warns(RuntimeWarning, match="live view stopped: OSError: no terminal"), block:
        assert asked.wait(30)


FRAMEWORKS = {
    "gradio": "gradio",
    "notebook": "IPython",
    "prometheus": "prometheus_client",
    "tensorboard": "torch.utils.tensorboard",
}


FILES = sorted(Path(integrations.__file__).parent.glob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the names of the modules that a file imports, each with a full stop at its end."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    plain = {f"{alias.name}." for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{node.module}." for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_framework_is_imported_only_by_its_own_file(path: Path) -> None:
    """No file of an integration imports another one's framework, and each imports its own."""
    names = imported(path)
    found = {kind for kind, package in FRAMEWORKS.items() if any(n.startswith(f"{package}.") for n in names)}
    assert found == {path.stem} & set(FRAMEWORKS)


def test_integrations_import_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra is an error of that import only: once installed, the same import works."""
    pytest.importorskip("prometheus_client")
    name = "torchfast.integrations.prometheus"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "prometheus_client.core", None)
        with pytest.raises(ImportError, match="not installed"):
            importlib.import_module(name)
    assert importlib.import_module(name).VRAMCollector is not None
