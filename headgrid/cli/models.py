"""Commands on checkpoints: generate, verify."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from headgrid.cli.show import Device, Json, console_for, print_table
from headgrid.errors import InvalidInput, VerificationFailed

if TYPE_CHECKING:
    from headgrid.experiment.model_job import Settled
    from headgrid.models.text import Text

Folder = Annotated[Path, typer.Option("--model", help="A local folder in Hugging Face format.")]
LayoutName = Annotated[str | None, typer.Option("--layout", help="How the ranks share the model, e.g. n2m2:batch.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Ranks: those of --layout, else all GPUs, or 1 on a CPU.")]
DTypeName = Annotated[str | None, typer.Option("--dtype", help="fp32, fp16 or bf16; the checkpoint's by default.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text; may be given several times.")]
IdsText = Annotated[str | None, typer.Option("--ids", help="Token ids instead of text: 1,2,3;4,5 is two sequences.")]


def generate(
    model: Folder,
    layout: LayoutName = None,
    ranks: Ranks = None,
    prompt: Prompts = None,
    ids: IdsText = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many for each prompt.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 for greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k most probable tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the fewest tokens of this probability together.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of drawn tokens: the same on every layout.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, where it has one.")] = True,
    ignore_stop: Annotated[bool, typer.Option("--ignore-stop", help="Go on behind stop tokens.")] = False,
    dtype: DTypeName = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Generate text with a checkpoint on any number of ranks.

    Examples:

        headgrid generate --model Qwen2.5-0.5B-Instruct --ranks 4 --prompt "Why is the sky blue?"

        headgrid generate --model my-model --layout n1m3:sequence --ids "1,2,3;4,5" --max-new-tokens 16 --json

        headgrid generate --model my-model --ranks 2 --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 7
    """
    from dataclasses import asdict

    from headgrid.experiment import generate as job
    from headgrid.experiment.model_job import predicted
    from headgrid.runtime.sampling import Sampling

    sampling = Sampling(temperature, top_k, top_p, seed)
    text, sequences = _inputs(model, prompt, ids, chat=chat)
    settled = _settled(model, layout, ranks, dtype, device, len(sequences))
    if settled.pretrained.spec.head == "none":
        raise InvalidInput(f"{model} is an encoder: it has no next token", command=f"headgrid verify --model {model}")
    room = settled.pretrained.spec.max_positions - max(map(len, sequences)) + 1
    if max_new_tokens > room:
        raise InvalidInput(
            f"{max_new_tokens} new tokens behind {max(map(len, sequences))}",
            numbers=f"{settled.pretrained.spec.name} has {settled.pretrained.spec.max_positions} positions",
            legal=(f"--max-new-tokens {room}",) if room > 0 else ("a shorter prompt",),
        )
    workload = _workload(settled, sequences, max_new_tokens - 1)
    settled.ensure(workload)
    console = console_for(as_json)
    stream = console.is_terminal and len(sequences) == 1
    payload = settled.payload(
        ids=sequences,
        max_new_tokens=max_new_tokens,
        sampling=asdict(sampling),
        stop_tokens=[] if ignore_stop else None,
        stream=stream,
    )
    show = _Streamed(console, text, sequences[0]) if stream else None
    answer = _run(job.TARGET, job.work, payload, settled, console, show)
    if answer is None:
        return
    answer = _described(settled, sequences) | answer | {"predicted_memory": predicted(settled, workload)}
    found: Any = answer["tokens"]
    answer["text"] = [text.decode(tokens) for tokens in found] if text is not None else None
    _print_generation(console, answer, show)
    if as_json:
        sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")


def verify(
    model: Folder,
    layout: LayoutName = None,
    ranks: Ranks = None,
    prompt: Prompts = None,
    ids: IdsText = None,
    decode_steps: Annotated[int, typer.Option(min=0, help="Tokens to decode behind each prompt.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the random prompts that are used where none are given.")] = 0,
    dtype: DTypeName = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Compare a checkpoint on a layout with one device: every layer, logits, tokens, memory, collectives.

    Ends with exit code 74 if the layout is not the model: if an error lies above its bound (1.5 times that of the plain
    model in the same dtype, 2 times in 16 bits on more than 4 ranks), or a prediction does not come true.

    Examples:

        headgrid verify --model Qwen2.5-0.5B-Instruct --layout n1m4:sequence

        headgrid verify --model my-model --ranks 3 --ids "1,2,3;4,5" --json
    """
    from headgrid.experiment import verify_model as job

    if dtype in ("float64", "fp64"):
        raise InvalidInput("float64 is the reference's own dtype", legal=("fp32", "fp16", "bf16"))
    _, sequences = _inputs(model, prompt, ids, chat=False) if prompt or ids is not None else (None, [])
    settled = _settled(model, layout, ranks, dtype, device, len(sequences) or 4)
    spec = settled.pretrained.spec
    steps = 0 if not spec.is_causal else min(decode_steps, spec.max_positions - 1)
    sequences = sequences or _random_prompts(settled, seed, min(32, spec.max_positions - steps))
    settled.ensure(_workload(settled, sequences, steps))
    console = console_for(as_json)
    answer = _run(job.TARGET, job.work, settled.payload(ids=sequences, decode_steps=steps), settled, console)
    if answer is None:
        return
    answer = _described(settled, sequences) | answer
    _print_verdict(console, answer)
    if as_json:
        sys.stdout.write(json.dumps(answer, allow_nan=False) + "\n")
    if answer["verdict"] != "verified":
        raise VerificationFailed(f"{settled.layout} of {model} is not verified", why=answer["reason"])


def _inputs(
    folder: Path, prompts: list[str] | None, ids: str | None, *, chat: bool
) -> tuple["Text | None", list[list[int]]]:
    """The tokenizer, if there is one, and the prompts as token ids."""
    from headgrid.models.text import open_text

    if (ids is None) == (not prompts):
        raise InvalidInput("give prompts or token ids", legal=('--prompt "Once upon a time"', '--ids "1,2,3;4,5"'))
    text = open_text(folder)
    if ids is not None:
        return text, parse_ids(ids)
    assert prompts is not None
    if text is None:
        raise InvalidInput(f"{folder} has no tokenizer.json", legal=('--ids "1,2,3;4,5"',))
    return text, [text.prompt(each) if chat else text.encode(each) for each in prompts]


def parse_ids(ids: str) -> list[list[int]]:
    """Sequences of token ids: commas within a sequence, semicolons between them. Raises InvalidInput."""
    try:
        sequences = [[int(token) for token in row.split(",")] for row in ids.split(";")]
    except ValueError as error:
        raise InvalidInput(
            f"--ids {ids!r:.60} are not token ids", why=str(error), legal=('--ids "1,2,3;4,5"',)
        ) from None
    return sequences


def _settled(
    model: Path, layout: str | None, ranks: int | None, dtype: str | None, device: str | None, batch: int
) -> "Settled":
    from headgrid.experiment.model_job import Wanted, settle
    from headgrid.runtime import launch

    started = launch.torchrun_rank()[1] if launch.joined_by_torchrun() else None
    wanted: Wanted = Wanted(folder=model, layout=layout, ranks=ranks, dtype=dtype, device=device, started_ranks=started)
    return settle(wanted, batch)


def _workload(settled: "Settled", ids: list[list[int]], steps: int) -> Any:
    from headgrid.models.model import workload_of

    spec = settled.pretrained.spec
    return workload_of(spec, ids, settled.dtype, decode_steps=steps, every_token=spec.head == "none")


def _random_prompts(settled: "Settled", seed: int, length: int) -> list[list[int]]:
    """Four sequences, the later ones shorter."""
    import random

    draw, vocab = random.Random(seed), settled.pretrained.spec.vocab_size
    lengths = [max(1, length - 5 * k) for k in range(4)]
    return [[draw.randrange(vocab) for _ in range(each)] for each in lengths]


def _described(settled: "Settled", ids: list[list[int]]) -> dict[str, Any]:
    described = {"model": settled.pretrained.spec.name, "layout": str(settled.layout), "ranks": settled.layout.ranks}
    return described | {"dtype": settled.dtype, "device": settled.device, "prompts": len(ids)}


def _run(
    target: str,
    work: Callable[..., None],
    payload: dict[str, Any],
    settled: "Settled",
    console: Console,
    stream: "_Streamed | None" = None,
) -> dict[str, Any] | None:
    """Run a job on all ranks and show what it tells; its answer, but None on torchrun's other ranks."""
    from headgrid.experiment.model_job import Tail
    from headgrid.runtime import launch

    answer: dict[str, Any] = {}
    joined = launch.joined_by_torchrun()
    with _shown(console, joined=joined, shown=not joined or launch.torchrun_rank()[0] == 0) as show:

        def told(event: dict[str, Any]) -> None:
            if event["event"] == "done":
                answer.update({key: value for key, value in event.items() if key != "event"})
            elif event["event"] == "tokens" and stream is not None:
                show(None)
                stream.add(event["new"])
            else:
                show(event)

        if joined:
            rank, ranks = launch.torchrun_rank()
            with launch.joined(settled.backend):
                work(rank, ranks, payload | {"events": ""}, told)
            return answer or None
        with tempfile.TemporaryDirectory(prefix="headgrid-") as folder:
            path = Path(folder) / "events.jsonl"
            tail = Tail(path)
            job = launch.Job(target, payload | {"events": str(path)}, settled.layout.ranks, settled.backend)
            launch.run(job, on_poll=lambda: _each(tail.new(), told))
            _each(tail.new(), told)
    return answer


def _each(events: Iterable[dict[str, Any]], told: Callable[[dict[str, Any]], None]) -> None:
    for event in events:
        told(event)


@contextmanager
def _shown(console: Console, *, joined: bool, shown: bool) -> Iterator[Callable[[dict[str, Any] | None], None]]:
    """A bar while the checkpoint is read, and what is done after that; None takes it away.

    In a process that is a rank itself (`joined`) no thread draws it.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    options: dict[str, Any] = {"transient": True, "auto_refresh": not joined, "disable": not shown}
    with Progress(*columns, console=console, **options) as bar:
        task = bar.add_task("starting ranks", total=None)

        def show(event: dict[str, Any] | None) -> None:
            if event is None:
                bar.stop()
            elif event["event"] == "load":
                bar.update(task, description="reading weights", completed=event["done"], total=event["whole"])
            elif event["event"] == "phase":
                bar.update(task, description=escape(event["name"]), completed=0, total=None)
            if joined and event is not None:
                bar.refresh()

        yield show


class _Streamed:
    """Text of one sequence on a terminal, as it comes."""

    def __init__(self, console: Console, text: "Text | None", prompt: Sequence[int]) -> None:
        self._console, self._stream = console, text.stream(prompt) if text is not None else None

    def add(self, new: list[list[int]]) -> None:
        """A step's tokens."""
        shown = self._stream.push(new[0]) if self._stream is not None else "".join(f"{token} " for token in new[0])
        self._console.print(escape(shown), end="", soft_wrap=True)

    def end(self) -> None:
        """What was held back, and a line's end."""
        self._console.print(escape(self._stream.finish()) if self._stream is not None else "")


def _print_generation(console: Console, answer: dict[str, Any], streamed: _Streamed | None) -> None:
    from headgrid.layout.layout import parse_layout

    if streamed is not None:
        streamed.end()
    elif answer["text"] is not None:
        for text in answer["text"]:
            console.print(escape(text), soft_wrap=True)
    else:
        for tokens in answer["tokens"]:
            console.print(",".join(map(str, tokens)), soft_wrap=True)
    rate = answer["decode_tokens_per_s"]
    figures = f"{answer['generated_tokens']} tokens on {answer['layout']} ({answer['dtype']}, {answer['device']}): "
    figures += f"TTFT {answer['ttft_s'] * 1e3:,.1f} ms, end to end {answer['end_to_end_s']:,.2f} s"
    figures += f", decode {rate:,.1f} tokens/s" if rate is not None else ""
    console.print(f"{figures}; weights read in {answer['load_s']:,.2f} s", style="dim")
    if parse_layout(answer["layout"]).linears == "fp8":
        console.print("linears in FP8, whose error is not measured here: headgrid verify states it", style="yellow")


def _print_verdict(console: Console, answer: dict[str, Any]) -> None:
    rows = [
        (f"layer {row['layer']}", _number(row["relative_error"]), _number(row["floor"]), "")
        for row in answer["per_layer"]
    ]
    ends = {f"output, {name}": phase for name, phase in answer["phases"].items()}
    rows += [
        (name, _number(each["relative_error"]), f"{each['floor']:.2e}", f"{each['bound']:.2e}")
        for name, each in (ends | {"output": answer}).items()
    ]
    title = f"{answer['model']} on {answer['layout']} ({answer['dtype']}, {answer['device']}), against fp64"
    print_table(console, title, ("", "relative error", "one device, same dtype", "bound"), rows)
    if answer["unquantised_floor"] is not None:
        floor = _number(answer["unquantised_floor"])
        console.print(f"linears in FP8 on both; the output of one device without FP8: {floor}")
    if answer["greedy"] is not None:
        found = answer["greedy"]
        console.print(f"greedy tokens: {found['matched']} of {found['compared']} equal, {found['ties']} near-ties")
    held = max(sum(rank.values()) for rank in answer["memory_per_rank"])
    as_said = "as predicted to the byte" if answer["memory_as_predicted"] else "NOT as predicted"
    console.print(f"weights and KV cache: {held / 2**20:,.1f} MiB on the fullest rank, {as_said}")
    console.print(f"collectives as predicted: {'yes' if answer['collectives_as_predicted'] else 'NO'}")
    if not answer["sensitive"]:
        moved = f"halving all scores would move the result by {_number(answer['sensitivity'])} only"
        console.print(f"- {moved}: an error in the attention could hide", style="yellow")
    console.print(escape(answer["verdict"]), style="green" if answer["verdict"] == "verified" else "red")


def _number(value: float | None) -> str:
    return f"{value:.2e}" if value is not None else "not finite"
