"""What `tubelet estimate` shows people of its figures: three tables, and how each figure came about."""

from typing import Any

from rich.console import Console
from rich.table import Table

UNKNOWN = "unknown: give --data.shards SHARDS, or --samples N where there are none yet"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def show(estimate: dict[str, Any], console: Console) -> None:
    """Prints what `estimate` returned."""
    console.print(_run_table(estimate))
    console.print(_memory_table(estimate))
    for line in _notes(estimate):
        console.print(line, highlight=False, markup=False)


def size_text(size_bytes: float) -> str:
    """Returns a number of bytes as people say it: 1.5 GiB."""
    unit = _unit(size_bytes)
    return f"{size_bytes / 1024**unit:.{0 if unit == 0 else 2}f} {UNITS[unit]}"


def count_text(count: float) -> str:
    """Returns a count as people say it: 94.2 M."""
    for factor, letter in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= factor:
            return f"{count / factor:.1f} {letter}"
    return f"{count:,.0f}"


def hours_text(hours: float) -> str:
    """Returns a duration: 35.2 h, or minutes where it is short."""
    return f"{hours:,.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def _unit(size_bytes: float) -> int:
    """Returns which of `UNITS` makes a number of bytes short."""
    return next((number for number in range(len(UNITS)) if size_bytes < 1024 ** (number + 1)), len(UNITS) - 1)


def _run_table(estimate: dict[str, Any]) -> Table:
    batch, length = estimate["batch"], estimate["length"]
    parameters, flops, checkpoints = estimate["parameters"], estimate["flops"], estimate["checkpoints"]
    table = Table("", "", "", title=f"{estimate['stage']} {estimate['config']}", show_header=False)
    table.add_row("processes", f"{estimate['world']:,}", f"{estimate['nodes']} x {estimate['gpus']} GPUs")
    parts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if name != "total")
    table.add_row("parameters", f"{parameters['total']:,}", parts)
    per_process = f"{batch['accumulation']} x {batch['micro_batch']} samples in each process"
    repeated = f", {batch['repeats']} clips of each" if batch["repeats"] > 1 else ""
    table.add_row("global batch", f"{batch['global_batch']:,}", per_process + repeated)
    table.add_section()
    if length["steps"] is None:
        table.add_row("steps", "", f"{length['epochs']:g} epochs; {UNKNOWN}")
    else:
        warmup = length["warmup_steps"]
        warming = f"{length['warmup_epochs']:g} epochs" if warmup is None else f"{warmup:,}"
        table.add_row("steps", f"{length['steps']:,}", f"the first {warming} warm up")
        epochs = length["epochs"]
        passes = (
            UNKNOWN if epochs is None else f"of {length['samples']:,} samples, {length['steps_per_epoch']:,} steps each"
        )
        table.add_row("epochs", "" if epochs is None else f"{epochs:,.4g}", passes)
        table.add_row("clips", count_text(length["clips"]), "seen in the run")
    whole = "" if flops["run"] is None else f", {count_text(flops['run'])}FLOP a run"
    table.add_row(
        "operations", f"{count_text(flops['step'])}FLOP", f"a step, {count_text(flops['clip'])}FLOP a clip{whole}"
    )
    table.add_section()
    kept = ""
    if checkpoints["written"]:
        kept = (
            f"each of {checkpoints['written']:,}, {checkpoints['kept']:,} of which stay: "
            f"{size_text(checkpoints['kept_bytes'])} in the end, {size_text(checkpoints['most_bytes'])} at most"
        )
    table.add_row("checkpoint", size_text(checkpoints["bytes"]), kept)
    _add_time(table, estimate)
    return table


def _add_time(table: Table, estimate: dict[str, Any]) -> None:
    measured = estimate["time"]
    if measured is None:
        table.add_row("GPU-hours", "", "not measured: give --throughput CLIPS_PER_SECOND, --from RUN or --measure")
        return
    table.add_row("throughput", f"{measured['clips_per_second_per_gpu']:,.4g} clips/s", "of each GPU")
    if measured["gpu_hours"] is None:
        table.add_row("GPU-hours", "", UNKNOWN)
    else:
        table.add_row("GPU-hours", hours_text(measured["gpu_hours"]), f"{hours_text(measured['hours'])} by the clock")
    if measured["peak_gib"] is not None:
        table.add_row("peak memory", f"{measured['peak_gib']:.2f} GiB", "measured here, without DeepSpeed")


def _memory_table(estimate: dict[str, Any]) -> Table:
    rows = estimate["memory"]
    columns = ["weights", "gradients", "optimizer", "buffers", "batches", "activations", "total"]
    if any(row["host"] for row in rows):
        columns.append("host")
    unit = _unit(max(row["total"] for row in rows))
    title = f"memory of each GPU in {estimate['precision']}, {UNITS[unit]}"
    table = Table("engine", title=title)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        name = f"{row['engine']} <-" if row["configured"] else row["engine"]
        style = "bold" if row["configured"] else None
        table.add_row(name, *(f"{row[column] / 1024**unit:.2f}" for column in columns), style=style)
    return table


def _notes(estimate: dict[str, Any]) -> list[str]:
    notes = ["<- as configured. Weights, gradients, optimizer and buffers follow from DeepSpeed's and torch's rules."]
    other = "kept" if estimate["activation_checkpointing"] else "recomputed"
    how = "Without" if estimate["activation_checkpointing"] else "With"
    plain, deepspeed = (estimate["activations"][engine][other] for engine in ("plain", "DeepSpeed"))
    notes.append(
        f"Activations are what the forward pass keeps, counted on fake tensors: an estimate. {how} "
        f"--activation_checkpointing they are {size_text(plain)}, under DeepSpeed {size_text(deepspeed)}."
    )
    notes.append(
        "Not counted: what the allocator cannot use, the device's libraries, and what lives no longer than one layer's "
        "backward pass."
    )
    if estimate["time"]:
        notes.append(f"Throughput: {estimate['time']['source']}.")
    return notes
