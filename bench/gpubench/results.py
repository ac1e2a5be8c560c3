"""What is kept, and how long there is: the JSON file, and the run of one section that writes to it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from gpubench.shapes import Shape


class Report:
    """The JSON file: sections by name, each with its state, its records and what was skipped in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content: dict = json.loads(path.read_text()) if path.exists() else {"sections": {}}

    def section(self, name: str) -> dict:
        return self.content["sections"].setdefault(name, {"state": "new", "records": [], "skipped": []})

    def records(self, name: str) -> list[dict]:
        return self.content["sections"].get(name, {}).get("records", [])

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1, default=str) + "\n")
        part.replace(self.path)


@dataclass
class Run:
    """One measuring process: its device, its time, and the section that it is in."""

    device: torch.device
    deadline: float
    report: Report
    shrink: int = 1
    current: str = ""
    tainted: bool = False
    """Whether a capture failed, after which PyTorch's allocator believes in it for good: time for a new process."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(self.device).L2_cache_size if self.on_gpu else 1 << 12

    @property
    def bandwidth(self) -> float | None:
        """Bytes a second of a large copy, read and written; None until it is measured."""
        records = self.report.records("bandwidth")
        return max(record["bytes_per_s"] for record in records) if records else None

    def seconds_left(self) -> float:
        return self.deadline - time.time()

    def shrunk(self, shape: Shape) -> Shape:
        """The shape itself, or in a trial of the script a smaller one."""
        return shape if self.shrink == 1 else Shape(shape.m, max(64, shape.n // self.shrink), shape.dtype)

    def add(self, record: dict) -> None:
        self.report.section(self.current)["records"].append(record)
        self.report.save()
        print(f"  {self.current}: {short(record)}", flush=True)

    def skip(self, what: object, why: str) -> None:
        self.report.section(self.current)["skipped"].append(f"{what}: {why}")
        self.report.save()
        print(f"  {self.current}: {what} skipped: {why}", flush=True)

    @contextmanager
    def case(self, what: object) -> Iterator[None]:
        """What fails inside is noted, unless the device is gone; results of other cases stay."""
        try:
            yield
        except Exception as error:
            self.skip(what, f"{type(error).__name__}: {str(error)[:500]}")
            self.check_device()
        finally:
            self.release()

    def cases(self, items: Sequence, seconds: float = 0.0) -> Iterator:
        """The items for which there is time, ``seconds`` being what one may take."""
        for item in items:
            if self.seconds_left() < seconds:
                self.skip(item, "no time left")
            else:
                yield item

    def check_device(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()  # raises again if the device is gone

    def release(self) -> None:
        """Give memory back to the GPU, that of tensors in cycles, too."""
        if self.on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def short(record: dict) -> str:
    """A record in one line, without what is long."""
    found = {key: f"{value:.4g}" if isinstance(value, float) else str(value) for key, value in record.items()}
    return " ".join(f"{key}={text}" for key, text in found.items() if len(text) <= 160)
