"""The command itself: what is given is used, names are understood or refused with a remedy, logs, locks and Ctrl-C."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from jprune import cli, flags
from jprune.checkpoint import save_hf
from jprune.files.lock import FolderLock
from jprune.jobs import ClassifierConfig, DecoderConfig
from jprune.methods.channels.after_training import AfterTrainingConfig
from jprune.methods.contract import Amount
from jprune.methods.names import METHODS
from jprune.models.llama import Llama, llama_config
from jprune.training.progress import Lines, bar, display


class Asked(Exception):
    """Carries the options that a run was made with."""


@pytest.fixture
def asked(monkeypatch):
    """The options and the folder that the command makes of its arguments; nothing is run."""

    def run(options, out, settings, *_):
        raise Asked(options, out, settings)

    monkeypatch.setattr("jprune.jobs.ClassifierRun", run)
    monkeypatch.setattr("jprune.jobs.DecoderRun", run)

    def of(*words):
        monkeypatch.setattr(sys, "argv", ["jprune", "prune", *map(str, words)])
        with pytest.raises(Asked) as found:
            cli.main()
        return found.value.args

    return of


@pytest.fixture
def said(monkeypatch, capsys):
    """The one line that the command ends with."""

    def of(*words):
        monkeypatch.setattr(sys, "argv", ["jprune", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1), err
        return err

    return of


@pytest.fixture
def folder(tmp_path):
    """What passes for the folder of a language model as long as nobody reads it."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "model"


def test_explicit_values_are_used_even_where_they_are_another_kinds_default(asked, folder):
    text = ("--model", folder, "--calibration", "x.txt")
    options, out, _ = asked(*text, "--batch-size", 64, "--learning-rate", 0.05, "--out", "o")
    assert (options.batch_size, options.learning_rate) == (64, 0.05) and str(out) == "o"
    options, *_ = asked("--batch-size", 4, "--learning-rate", 1e-4)
    assert (options.batch_size, options.learning_rate) == (4, 1e-4)
    assert asked(*text)[0] == DecoderConfig(str(folder), calibration="x.txt")
    assert asked()[::2] == (ClassifierConfig(), AfterTrainingConfig())


def test_every_setting_of_the_job_and_of_the_method_is_a_flag(asked, folder):
    options, _, settings = asked("--steps", 3, "--keep", 0.25, "--quantity", "params", "--min-units", 2)
    assert options == ClassifierConfig(keep=0.25, quantity="params")
    assert settings == AfterTrainingConfig(steps=3, min_units=2)
    assert options.amount == Amount(0.25, 0.75, "params")
    options, _, settings = asked("--model", folder, "--calibration", "x", "--scope", "uniform", "--sparsity", 0.4)
    assert settings.scope == "uniform" and options.amount == Amount(0.6, 0.4, "units")
    for kind, config in (("classifiers", ClassifierConfig), ("decoders", DecoderConfig)):
        for method in METHODS[kind].values():
            names = {f.name for c in (config, method.config) for f in dataclasses.fields(c)}
            assert names <= {f.name for f in dataclasses.fields(cli._prune_flags())}
            assert names - {"model"} <= set(flags.about(config)) | set(flags.about(method.config)), (
                "a flag without help"
            )


def test_the_help_says_the_defaults_of_both_kinds(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jprune", "prune", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    page = " ".join(capsys.readouterr().out.replace("│", " ").split())
    zoo, text = ClassifierConfig(), DecoderConfig("m", calibration="x")
    for name in ("batch_size", "learning_rate", "method"):
        assert f"(default: {getattr(zoo, name)}; language models: {getattr(text, name)})" in page
    assert f"(default: {text.length}; language models only)" in page and "(default: 20; classifiers only)" in page
    assert "(default: 0.01; masksparsity only)" in page


def test_shares_are_shares_whatever_they_are_written_as():
    assert Amount.of("params", keep=1) == Amount(1.0, 0.0, "params") and isinstance(
        Amount.of("macs", sparsity=0).keep, float
    )
    assert Amount.of("macs", sparsity=0.3) == Amount.of("macs", keep=0.7) == Amount(0.7, 0.3, "macs")
    for wrong in (
        {"keep": True},
        {"keep": 0},
        {"sparsity": 1},
        {"sparsity": 0.9999999999999},
        {"keep": 1e-13},
        {"keep": np.nan},
    ):
        with pytest.raises(ValueError, match="the share to"):
            Amount.of("params", **wrong)


def test_a_switch_that_is_on_by_default_is_refused_when_flags_are_made():
    @dataclasses.dataclass(frozen=True)
    class Config:
        first: bool = True

    with pytest.raises(ValueError, match="first is a switch that is on by default"):
        flags.union("x", "", {"": Config}, cli.Nothing)


def test_flags_of_another_kind_or_method_are_refused_even_with_their_default(said, folder):
    assert "--length means nothing here: 'resnet20' is a classifier" in said("prune", "--length", 1024)
    line = said("prune", "--model", folder, "--calibration", "x.txt", "--epochs", 20)
    assert "--epochs means nothing here" in line and "is the folder of a language model" in line
    line = said("prune", "--method", "taylor", "--threshold", 0.01)
    assert "--threshold means nothing to the method 'taylor'" in line and "(masksparsity)" in line
    line = said("prune", "--sparsity", 0.3, "--keep", 0.7)
    assert "either --sparsity, the share to remove, or --keep" in line
    assert "is for decoders, not for classifiers" in said("prune", "--method", "cfsp")
    assert "give --sparsity or --keep too" in said("prune", "--method", "masksparsity", "--quantity", "units")
    assert "--num-classes is 0" in said("explain", "resnet_digits", "--num-classes", 0)
    assert "--length means nothing here: resnet_digits is a model of the zoo" in said(
        "explain", "resnet_digits", "--length", 9
    )
    assert "there is no folder" in said("eval", "--model", "/nowhere", "--evaluation", "x")


def test_what_is_neither_a_classifier_nor_a_folder_is_named_with_a_remedy(said, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "w.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "quantised").mkdir()
    (tmp_path / "quantised" / "q.gguf").write_bytes(b"GGUF")
    for name, parts in {
        "x.gguf": ["GGUF files are not read", "gguf_file='x.gguf'"],
        "quantised": ["no config.json", "gguf_file='q.gguf'"],
        "w.safetensors": ["one file", "config.json beside it"],
        "empty": ["empty", "Hugging Face folder"],
        "meta-llama/Llama-3.2-1B": ["nothing is downloaded", "hf download meta-llama/Llama-3.2-1B"],
        "resnet21": ["did you mean resnet", "resnet20"],
        "./modell": ["there is no folder", "did you mean model?"],
        "nonsense": ["no model 'nonsense'", "jprune list"],
        "[/x]": ["no model '[/x]'"],
    }.items():
        for command in (("prune", "--calibration", "x.txt", "--model"), ("explain",)):
            line = said(*command, name)
            assert all(part in line for part in parts), line
            assert "means nothing" not in line


def test_names_with_brackets_are_printed_as_they_are(capsys):
    cli._show("[/a] of [b]", [("", "[/head]"), ("[bold]row[/]", "[/cell]")])
    cli._say("report: [/b]z/report.html")
    out = capsys.readouterr().out
    assert all(text in out for text in ("[/a] of [b]", "[/head]", "[bold]row[/]", "[/cell]", "[/b]z/report.html"))
    console = Console(file=io.StringIO(), force_terminal=True)
    with display(True, console) as progress:
        progress.add_task("loading [/b]z", total=1)
    assert "loading [/b]z" in console.file.getvalue()


# -- a log -------------------------------------------------------------------------------------------------------------


class Seen(io.StringIO):
    """A log; remembers what had reached the reader at every flush."""

    def __init__(self):
        super().__init__()
        self.flushed = ""

    def flush(self):
        self.flushed = self.getvalue()


def wait_for(text, log):
    until = time.monotonic() + 20
    while text not in log.flushed and time.monotonic() < until:
        time.sleep(0.01)
    assert text in log.flushed


def test_a_log_gets_lines_while_the_work_goes_on():
    log = Seen()
    with Lines(Console(file=log), every=0.02, announce=True) as progress:
        whole = progress.add_task("all of it", total=10)
        progress.add_task("loading", total=1)
        assert "loading" in log.flushed  # as soon as it begins
        progress.update(whole, completed=4)
        wait_for("all of it: 4 of 10", log)
        wait_for("; loading", log)  # without any update of its own
    end = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == end


def test_what_is_tracked_counts_without_a_display():
    log = Seen()
    with Lines(Console(file=log), every=0.02) as progress:
        for value in progress.track([1, 2, 3], description="calibrating"):
            time.sleep(0.2)  # longer than rich's own thread lives
            assert progress.tasks[0].completed == value - 1
        assert progress.finished and "calibrating: 2 of 3" in log.getvalue()


def test_terminals_get_bars_and_the_quiet_nothing():
    assert isinstance(display(True, Console(file=io.StringIO())), Lines)
    assert not isinstance(display(True, Console(file=io.StringIO(), force_terminal=True)), Lines)
    quiet = Console(file=io.StringIO())
    with display(False, quiet) as progress:
        progress.add_task("loading", total=1)
    with bar(False, 3, "training") as update:
        update(1, "")
    assert quiet.file.getvalue() == ""


# -- locks and signals ---------------------------------------------------------------------------------------------------


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    first, second = FolderLock(tmp_path / "new" / "run"), FolderLock(tmp_path / "new" / ".." / "new" / "run")
    with first, pytest.raises(ValueError, match=rf"is in use by process {os.getpid()} on .* since"):
        second.acquire()
    assert not (tmp_path / "new").exists()
    with second, pytest.raises(ValueError, match="in use"):
        first.acquire()


HOLD = """
import sys
from jprune.files.lock import FolderLock
lock = FolderLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"in use by process {process.pid} "):
        FolderLock(tmp_path / "run").acquire()
    process.kill()
    process.communicate()
    assert (tmp_path / ".run.lock").exists()  # it had no time to tidy up
    with FolderLock(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []


INTERRUPTED = """
import os, signal
from jprune import interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupt.obey_ctrl_c()
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException:  # as imports of native libraries do
    pass
print("went on")
"""


def test_ctrl_c_while_libraries_are_imported_ends_with_its_own_status():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "") and done.stderr == "interrupted before the work began\n"
    ignored = INTERRUPTED.replace("signal.default_int_handler", "signal.SIG_IGN")
    assert subprocess.run([sys.executable, "-c", ignored], capture_output=True, text=True).stdout == "went on\n"


def test_ctrl_c_during_a_run_says_how_to_go_on(monkeypatch, capsys):
    ended = []

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", ["jprune", "prune", "--out", "my run", "--resume"])
    cli._interruptible(lambda: interrupted, resumable=True)
    assert (
        ended == [130] and capsys.readouterr().err == "interrupted; go on with: jprune prune --out 'my run' --resume\n"
    )
    assert signal.getsignal(signal.SIGINT) is not cli.stop


def test_a_language_models_folder_is_explained(tmp_path, monkeypatch, capsys):
    config = llama_config(32, 16, 24, 2, 4, kv_heads=2)
    shapes = jax.eval_shape(Llama(config).init, jax.random.key(0), np.zeros((1, 4), np.int32))
    save_hf(jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes), config, tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["jprune", "explain", str(tmp_path / "model"), "--length", "8"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    out = capsys.readouterr().out
    assert end.value.code == 0 and "params/layer1/mlp/gate/kernel:1" in out and "MACs" in out
