"""Thousands of bad inputs for every reader: ``python -m tests.fuzz [--cases 3000] [--seed 0] [--reader NAME]``.

Each case runs in a process of its own. Counted are tracebacks (anything but a QuantoolError), hangs (over 10 s of processor
time) and memory (over 1 GiB); the exit code is 1 when there is any, and the folder with its input is kept and named.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantool.config.load import load
from quantool.config.schema import Config
from quantool.errors import QuantoolError
from quantool.given_artifacts import artifacts_of
from quantool.plugins import find
from quantool.runtime.progress import Progress
from quantool.source.resolve import resolve
from quantool.texts import corpus
from tests.checkpoint import write_checkpoint, write_shards

ROOT = Path(__file__).parents[1]
SECONDS, MEMORY = 10, 1 << 30
Reader = Callable[[random.Random, Path], None]


def deep(dice: random.Random) -> str:
    count = dice.choice([70, 500, 5000, 100_000])
    return dice.choice(
        ["[" * count, "[" * count + "]" * count, '{"a":' * count, '{"a":' * count + "1" + "}" * count]
    )


def wide(dice: random.Random) -> str:
    return (
        "["
        + ",".join([dice.choice(["1", "{}", "[]", '""', '{"a":0}'])] * dice.choice([10_000, 2_000_000]))
        + "]"
    )


def scalar(dice: random.Random) -> Any:
    """A JSON value that is wrong in most places."""
    return dice.choice([
        None, True, False, 0, -1, 1, 3, 2**31, 2**63, 10**30, 10**200, 0.5, -0.0, 1e300, float("nan"), float("inf"), "", "abc", "1",
        "\0", "\ud800", "a\nb", "../x", "/dev/zero", "x" * 100_000, "é" * 50, [], {}, [1], [[]], ["a"], {"a": 1}, [None],
        {"name": 1, "template": 2}, [{"name": "default"}], [{"content": [1], "id": "x"}], list(range(100)),
    ])  # fmt: skip


def hostile_text(dice: random.Random) -> bytes:
    """A value that Python's own json cannot write."""
    return dice.choice([
        deep(dice).encode(), wide(dice).encode(), b"9" * 5000, b"-" + b"1" * 100_000, b"1e999999", b"0." + b"3" * 9000, b"NaN",
        b"\xff\xfe", b'"\\ud800"', b'"\x00"', b'"' + b'\\"' * 100_000, b"{" * 3, b"", b"\xef\xbb\xbf{}", "{}".encode("utf-16"),
        b'{"a": 1, "a": 2}', b"\n" * 100_000, b"Infinity",
    ])  # fmt: skip


def mutated(value: Any, dice: random.Random, most: int = 2) -> Any:
    """A copy of a JSON value with one to ``most`` changes anywhere in it."""
    value = json.loads(json.dumps(value))
    for _ in range(dice.randint(1, most)):
        holders: list[Any] = [value]
        for holder in holders:
            inside = list(holder.values() if isinstance(holder, dict) else holder)
            holders += [entry for entry in inside if isinstance(entry, (dict, list)) and entry]
        holder = dice.choice([entry for entry in holders if entry] or [{"": 0}])
        key = dice.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        if dice.random() < 0.15:
            del holder[key]
        elif dice.random() < 0.1 and isinstance(holder, dict):
            holder[dice.choice(["", "\0", "k" * 10_000, "a\nb", "text_config"])] = scalar(dice)
        else:
            holder[key] = scalar(dice)
    return value


def bad_json(value: Any, dice: random.Random) -> bytes:
    """The text of a JSON value, spoilt: changed values, hostile pieces in it, bytes flipped, cut off."""
    kind = dice.random()
    if kind < 0.08:
        return hostile_text(dice)
    content = json.dumps(mutated(value, dice)).encode()
    if kind < 0.3:  # a hostile piece in the place of a value
        places = [index for index, byte in enumerate(content) if byte == ord(":")] or [0]
        place = dice.choice(places) + 1
        rest = content[place:]
        ends = [position for position in map(rest.find, (b",", b"}", b"]")) if position >= 0]
        return content[:place] + hostile_text(dice) + rest[min(ends, default=0) :]
    if kind < 0.5:
        return bad_bytes(content, dice)
    return content


def bad_bytes(content: bytes, dice: random.Random) -> bytes:
    spoilt = bytearray(content)
    for _ in range(dice.randint(1, 6)):
        place = dice.randrange(len(spoilt) + 1)
        match dice.randrange(4):
            case 0:
                spoilt[place : place + 1] = bytes([dice.randrange(256)])
            case 1:
                del spoilt[place : place + dice.choice([1, 4, 50])]
            case 2:
                spoilt[place:place] = dice.choice(
                    [b"\0" * 8, b"\xff" * 8, b"[", b"}", b'"', b"\\", b"9" * 50]
                )
            case _:
                del spoilt[place : len(spoilt) if dice.random() < 0.3 else place]
    return bytes(spoilt)


TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{{ '%999999999d'|format(1) }}", "{{ range(10**9) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% if a %}" * 3000 + "{% endif %}" * 3000, "{{ " + "(" * 3000 + ")" * 3000 + " }}", "{{ messages[9] }}", "{% for a in b %}" * 30,
    "{{ 1/0 }}", "{{ messages|map(attribute='x')|list|tojson }}", "{{ strftime_now('%s' * 100000) }}", "{% include 'a' %}",
    "{{ raise_exception(messages) }}", "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__.os }}", "\ud7ff\0{{", "{{ x.y.z }}",
)  # fmt: skip


def checkpoint(dice: random.Random, folder: Path) -> None:
    """Any small file, header or index of a checkpoint."""
    place = (write_shards if dice.random() < 0.3 else write_checkpoint)(folder / "model")
    index = place / "model.safetensors.index.json"
    tokenizer_config = {
        "eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}, "added_tokens_decoder": {"7": {"content": "<e>"}},
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}, {"name": "rag", "template": "x"}],
    }  # fmt: skip
    name = dice.choice(
        ["config.json"] * 4 + ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"] * 2
        + ["generation_config.json", "special_tokens_map.json", "vocab.json", "index", "weights", "weights", "header"]
    )  # fmt: skip
    file = place / name
    if name == "README.md":
        front = "license: [mit, {a: 1}]\nlanguage:\n- en\n- no\ndate: 2024-01-02\ntags: &t [a, b]\nbase_model: *t\n"
        file.write_bytes(b"---\n" + bad_yaml(front, dice) + b"\n---\n# Title\n")
    elif name == "chat_template.jinja":
        text = dice.choice(TEMPLATES)
        file.write_bytes(bad_bytes(text.encode(), dice) if dice.random() < 0.3 else text.encode())
    elif name in ("weights", "header"):
        file = dice.choice(sorted(place.glob("*.safetensors")))
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        if name == "header":
            header = bad_json(json.loads(content[8 : 8 + length]), dice)
            file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
        else:
            file.write_bytes(bad_bytes(content[: 8 + length], dice) + content[8 + length :])
    elif name == "index":
        known = (
            json.loads(index.read_text()) if index.exists() else {"weight_map": {"a": "model.safetensors"}}
        )
        index.write_bytes(bad_json(known, dice))
    else:
        known = json.loads(file.read_text()) if file.exists() else {"a": {"content": "b"}, "c": 1}
        if name == "config.json":
            known |= {
                "sliding_window": 16,
                "layer_types": ["full_attention"],
                "head_dim": 2,
                "text_config": {},
            }
        if name == "tokenizer_config.json":
            known = tokenizer_config
            (place / dice.choice(["chat_template.jinja", "tokenizer.json"])).unlink()
        file.write_bytes(bad_json(known, dice))
    resolve(Config(model_id=str(place)), weights=True, progress=Progress(quiet=True))


WORDS = (
    "1:30", "0x" + "f" * 6000, "9" * 6000, "2024-13-45", "!!int abc", "!!timestamp x", "[" * 20_000, "{" * 300, "&a [*a]", "*b", "'\\0'",
    '"\\0"', '"\\ud800"', '"\\U00110000"', "<<: 3", "? [a]", "|\n  x", ">-", "---", "\t", "%YAML 9999999999.1", "!!binary aGk=", "=", "~",
    "- " * 400, "no", ".nan", "1e999", "\x07", "x" * 50_000, "k: " * 100, "null", "[]", "{}", "-1", "10000000000000000", "a b: c",
)  # fmt: skip


def bad_yaml(text: str, dice: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(dice.randint(1, 3)):
        number = dice.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        word = dice.choice(WORDS)
        match dice.randrange(4):
            case 0:
                lines[number] = f"{key}: {word}" if colon else word
            case 1:
                lines.insert(number, word)
            case 2:
                lines.insert(number, lines[dice.randrange(len(lines))])
            case _:
                fold = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
                lines += ["a0: &a0 [x]", *fold] if dice.random() < 0.3 else []
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    return bad_bytes(content, dice) if dice.random() < 0.3 else content


def configuration(dice: random.Random, folder: Path) -> None:
    """A configuration file and its overrides."""
    text = dice.choice(sorted((ROOT / "configs").glob("*.yaml"))).read_text(encoding="utf-8")
    path = folder / "c.yaml"
    path.write_bytes(
        bad_yaml(text, dice)
        if dice.random() < 0.9
        else dice.choice([b"a: 1\n" * 10_000_000, b"\0" * 5_000_000, b"\xff"])
    )
    keys = ("seed", "validation.corpora.0.path", "quantizations." + "9" * 5000, ".".join("k" * 3000), "validation", "", "a..b",
        "quantization_config.max_shard_size", "metrics", "quant_level", "validation.gates.*.max_mean_kld", "\ud800", "x\0")  # fmt: skip
    overrides = [f"{dice.choice(keys)}={dice.choice(WORDS)}" for _ in range(dice.randrange(3))]
    load(path, overrides, find)


def text(dice: random.Random, folder: Path) -> None:
    """Held-out and calibration text."""
    path = folder / f"t.{dice.choice(['txt', 'jsonl', 'jsonl', 'jsonl', 'parquet'])}"
    chat = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
        "tools": [{"type": "function"}],
    }
    rows: list[Any] = [{"text": "uno"}, chat, {"text": "dos", "meta": [1]}]
    if path.suffix == ".txt":
        path.write_bytes(
            dice.choice(
                [
                    b"\n" * 10**8,
                    b"\0" * 10**7,
                    b" ",
                    b"",
                    b"\xff\xfe",
                    b"a" * 10**7,
                    bad_bytes(b"some text " * 9, dice),
                ]
            )
        )
    elif path.suffix == ".jsonl":
        few = dice.random() < 0.97
        path.write_bytes(b"\n".join(bad_json(row, dice) for row in rows) if few else b"\n" * 10**8)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        sink = pa.BufferOutputStream()
        if dice.random() < 0.5:
            parquet.write_table(pa.Table.from_pylist(rows), sink)
        else:
            column = dice.choice(
                [[None] * 9, [1, 2], [[["x"]]], [b"\xff"], [{"a": {"b": 1}}], [" "] * 1_100_000]
            )
            parquet.write_table(pa.table({dice.choice(["text", "messages", "x"]): column}), sink)
        content = sink.getvalue().to_pybytes()
        path.write_bytes(bad_bytes(content, dice) if dice.random() < 0.7 else content)
    key = dice.choice(["corpora", "conversations", "dataset_path", "prompts"])
    settings: dict[str, Any] = {"corpora": [{"name": "c", "path": str(path)}]} if key == "corpora" else {}
    settings |= {"conversations": str(path)} if key == "conversations" else {}
    settings |= {"behaviour": {"prompts": str(path)}} if key == "prompts" else {}
    fields = {"dataset_path": str(path)} if key == "dataset_path" else {}
    config = Config.model_validate({"model_id": "m", "validation": settings, **fields})
    if key == "dataset_path":
        corpus.calibration(config)
    corpus.require_texts(config)


def record(dice: random.Random, folder: Path) -> None:
    """quantool.json of a downloaded repository."""
    place = write_checkpoint(folder / "tiny-FP8_DYNAMIC")
    artifact = {"level": "FP8", "files": [{"name": "model.safetensors", "bytes": 1, "sha256": "0"}]}
    (place / "quantool.json").write_bytes(bad_json({"reports": [{"artifact": artifact}]}, dice))
    artifacts_of(place)


def gguf(dice: random.Random, folder: Path) -> None:
    """A GGUF file that somebody made."""

    def string(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    keys = string("general.architecture") + struct.pack("<I", 8) + string("llama")
    keys += string("a.list") + struct.pack("<IIQ", 9, 4, 3) + struct.pack("<3I", 1, 2, 3)
    keys += string("general.alignment") + struct.pack("<II", 4, 32)
    tensor = string("token_embd.weight") + struct.pack("<IQQIQ", 2, 8, 4, 0, 0)
    content = b"GGUF" + struct.pack("<IQQ", 3, 1, 3) + keys + tensor
    content += b"\0" * (-len(content) % 32)
    spoilt = bytearray(content)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(spoilt))
        width = dice.choice([1, 4, 8])
        number = dice.choice([0, 1, 9, 255, 2**31, 2**32 - 1, 10**9, 2**63, 2**64 - 1]) % (1 << 8 * width)
        spoilt[place : place + width] = number.to_bytes(width, "little")
    name = dice.choice(
        ["a-Q8_0.gguf", "a-Q8_0.gguf", "a-Q8_0-00001-of-00000.gguf", "a-Q8_0-00001-of-99999.gguf"]
    )
    (folder / name).write_bytes(bytes(spoilt) + b"\0" * 128)
    artifacts_of(folder / name)


READERS: dict[str, tuple[Reader, int]] = {
    "checkpoint": (checkpoint, 6), "configuration": (configuration, 4), "text": (text, 3), "record": (record, 1), "gguf": (gguf, 1),
}  # fmt: skip
"""By name, with their share of the cases."""


@dataclass
class Tally:
    """What the cases of one reader came to."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    largest: int = 0


def run_case(reader: Reader, seed: str, folder: Path) -> tuple[str, float, int]:
    """How a case ended, its processor seconds, and the most bytes of memory of it or a child beyond what this process holds."""
    inherited = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    child = os.fork()
    if child == 0:
        code = 3
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            reader(random.Random(seed), folder)
            code = 0
        except QuantoolError as error:
            code = 1 if error.message.strip() else 3
        except BaseException:  # noqa: BLE001 - this is what is looked for
            (folder / "traceback.txt").write_text(traceback.format_exc())
        finally:
            os._exit(code)
    _, status, usage = os.wait4(child, 0)
    ended = {0: "accepted", 1: "refused"}.get(os.waitstatus_to_exitcode(status), "TRACEBACK")
    seconds, memory = usage.ru_utime + usage.ru_stime, max(usage.ru_maxrss * 1024 - inherited, 0)
    if os.WIFSIGNALED(status) or seconds > SECONDS:
        ended = "HANG" if seconds > SECONDS else "CRASH"
    elif memory > MEMORY:
        ended = "MEMORY"
    return ended, seconds, memory


def warm_up(folder: Path) -> None:
    """Import and remember, before processes are forked, what every sound input needs."""
    import pyarrow as pa
    from pyarrow import parquet

    for write in (write_checkpoint, write_shards):
        resolve(
            Config(model_id=str(write(folder / write.__name__))), weights=True, progress=Progress(quiet=True)
        )
    load(ROOT / "configs" / "methods.yaml", (), find)
    parquet.write_table(pa.table({"text": ["uno"]}), folder / "a.parquet")
    corpus.calibration(Config(model_id="m", dataset_path=folder / "a.parquet"))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases and print one line a reader; 1 when any of them was bad."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", choices=READERS, action="append")
    options = parser.parse_args(arguments)
    chosen = {name: READERS[name] for name in options.reader or READERS}
    share = options.cases / sum(weight for _, weight in chosen.values())
    keep = Path(tempfile.mkdtemp(prefix="quantool-fuzz-"))
    warm_up(keep / "sound")
    started, bad = time.monotonic(), 0
    for name, (reader, weight) in chosen.items():
        tally = Tally()
        for number in range(max(1, round(share * weight))):
            folder = keep / f"{name}-{number}"
            folder.mkdir()
            ended, seconds, memory = run_case(reader, f"{options.seed}/{name}/{number}", folder)
            tally.counts[ended] += 1
            tally.slowest, tally.largest = max(tally.slowest, seconds), max(tally.largest, memory)
            if ended.isupper():
                bad += 1
                sys.stdout.write(f"{ended}: {folder}\n")
                sys.stdout.flush()
            else:
                shutil.rmtree(folder)
        counts = ", ".join(f"{count} {ended}" for ended, count in sorted(tally.counts.items()))
        sys.stdout.write(
            f"{name}: {counts}; slowest {tally.slowest:.1f} s, largest {tally.largest >> 20} MiB\n"
        )
        sys.stdout.flush()
    sys.stdout.write(f"{bad} bad, {time.monotonic() - started:.0f} s\n")
    if not bad:
        shutil.rmtree(keep)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
