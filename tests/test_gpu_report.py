"""gpu_report.py on a CPU with tiny sizes: every phase's figures and checks, resuming, failures, the time limit."""

import re
import time

import gpu_report
import pytest
from conftest import read_log


@pytest.fixture
def report(text_data, chat_data, tmp_path, monkeypatch):
    """Return a function that runs phases; it returns the exit code and the report. bench.py fails at once."""
    monkeypatch.setattr(gpu_report, "BENCH_RUNS", (("no_stage",),))
    sizes = {"model": "tiny", "batch_tokens": 1024, "minutes": 1.0, "device": "cpu"}

    def run(*phases: str, **changes) -> tuple[int, str]:
        flags = {"data": text_data, "chat": chat_data, "out": tmp_path / "report"} | sizes | changes
        code = 0
        try:
            gpu_report.main(gpu_report.Config(phases, **flags))
        except SystemExit as stop:
            code = stop.code
        return code, (tmp_path / "report" / "report.md").read_text()

    return run


def test_all_phases(report, run_script, text_data, tmp_path, capsys):
    """The phase that fails is reported, the others run; the same command again runs only the failed one."""
    started = time.monotonic()
    run_script("pretrain.py", "--data", text_data, "--model", "tiny", "--batch_tokens", 1024, "--dry_run", fresh=True)
    minutes = max(0.2, 2.5 * (time.monotonic() - started) / 60)  # enough for some steps, also on a busy machine
    code, text = report(minutes=minutes)
    assert code == 1 and text.startswith("## CPU") and "torch" in text
    assert "| bench | runs to its end | **failed** | see below |" in text and text.count("**failed**") == 1
    assert re.search(r"Failure of bench:\n\n````text\nbench.py .*no_stage.*: exit code 2\n", text)
    assert re.search(r"\| tests \| tests marked `gpu` \| passed \| \d+ skipped \|", text)
    rows = read_log(tmp_path / "report" / "pretrain" / "run")
    steps = [row["step"] for row in rows if "loss" in row]
    stopped = len(steps) - gpu_report.RESUMED_STEPS
    assert steps == list(range(1, len(steps) + 1)) and stopped > 1
    assert f"| resumes after `--max_minutes` at the next step | passed | step {stopped + 1:,} |" in text
    assert f"validation loss | {rows[0]['val_loss']:.3f} to {rows[-1]['val_loss']:.3f} |" in text
    assert re.search(r"\| pretrain \| peak memory \| \d+\.\d+ GB \|", text) and "9,536 steps in" in text
    assert re.search(r"losses are equal with 32 and 64 rows \| passed \| difference \d\.\de-\d+", text)
    assert "| finetune | validation loss falls | passed |" in text and text.count(" tokens/s |") == 2
    assert all(f"\n> {question}\n" in text for question in gpu_report.QUESTIONS)

    capsys.readouterr()
    code, again = report(minutes=minutes)
    assert code == 1 and again.count("\n") == text.count("\n")
    output = capsys.readouterr().out
    assert re.findall(r"(\w+): running", output) == ["bench"] and output.count("passed before") == 5
    with pytest.raises(gpu_report.UserError, match=r"minutes was [\d.]+; choose another --out"):
        report(minutes=5.0)


def test_bench(report, gpt2_tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("Some words that are said again and again.\n\n" * 20_000)
    arguments = ("tokenize", "--repeats", "2", "--files", str(tmp_path / "a.txt"))
    monkeypatch.setattr(gpu_report, "BENCH_RUNS", (arguments, arguments))
    code, text = report("bench")
    assert code == 0 and "Not run: tests, pretrain" in text
    assert re.search(r"\| bench \| tokenize \| [\d,]+ tokens/s \| ±\d+%, [\d.]+ x process pool \|", text)


def test_failed_tests_are_a_failure(report, monkeypatch, tmp_path):
    (tmp_path / "tests").mkdir()
    file = tmp_path / "tests" / "test_it.py"
    file.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it():\n    raise ValueError('broken')\n")
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    code, text = report("tests")
    assert code == 1 and "| tests | tests marked `gpu` | **failed** | 1 failed |" in text
    assert "ValueError: broken" in text.partition("Failure of tests:")[2]


def test_a_phase_stops_at_its_time_limit(report, monkeypatch):
    monkeypatch.setattr(gpu_report, "TIME_LIMIT", 0.2)
    code, text = report("tests")
    assert code == 1 and "stopped at the time limit of 0.2 s" in text


def test_out_of_memory_is_not_a_failure(report, monkeypatch):
    def run_script(phase, *args, **options):
        raise gpu_report.PhaseError("pretrain.py: exit code 2\nerror: out of GPU memory: for training halve it")

    monkeypatch.setattr(gpu_report.Phase, "run_script", run_script)
    code, text = report("numerics")
    assert code == 1 and "| numerics | 64 rows per forward pass | out of memory |" in text
    assert "| numerics | 32 rows fit in memory | **failed** |" in text


def test_errors_come_before_the_work(fails, chat_data):
    flags = ("tests/gpu_report.py", "--chat", chat_data, "--device", "cpu")
    assert "--data nowhere is not a complete dataset folder: run prepare_fineweb.py" in fails(
        *flags, "--data", "nowhere"
    )
    assert "no NVIDIA GPU" in fails(*flags, "--device", "cuda")
    assert "--minutes is 9.0: it must be above 0 and at most 5" in fails(*flags, "--minutes", 9)
