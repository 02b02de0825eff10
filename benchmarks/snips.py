"""Makes a task that no corpus of ours knows: spoken commands to their intent and slots, for ``benchmarks.unseen``.

    git clone https://github.com/sonos/nlu-benchmark
    python -m benchmarks.snips nlu-benchmark --output stranger

Source: Coucke et al., "Snips Voice Platform", 2018, arXiv 1805.10190 (CC0). Draws ``train1.jsonl`` to ``train3.jsonl``
of 100 lines from the training files of all seven intents, no command twice, and ``test.jsonl`` of 200 from the
validation files, without any command that is in a training file. A target is
``intent : RateBook | rating value : five``, its slots in their order in the command.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = "2017-06-custom-intent-engines"


def pair(intent: str, parts: list[dict[str, Any]]) -> tuple[str, str]:
    """The command, and its intent and slots."""
    slots = [f"{part['entity'].replace('_', ' ')} : {part['text'].strip()}" for part in parts if "entity" in part]
    return "".join(part["text"] for part in parts).strip(), " | ".join([f"intent : {intent}", *slots])


def commands(clone: Path, name: str) -> Iterator[tuple[str, str]]:
    """All of the files of a kind, ``train_{intent}_full`` or ``validate_{intent}``, each command once."""
    seen = set[str]()
    for folder in sorted(path for path in (clone / FOLDER).iterdir() if path.is_dir()):
        intent = folder.name
        read = json.loads((folder / f"{name.format(intent=intent)}.json").read_text(encoding="utf-8", errors="replace"))
        for command in read[intent]:
            text, target = pair(intent, command["data"])
            if "\ufffd" not in text and text not in seen:  # some bytes there are no UTF-8
                seen.add(text)
                yield text, target


def write(path: Path, pairs: list[tuple[str, str]]) -> None:
    """The trainer's JSONL."""
    lines = (json.dumps({"input": text, "target": target}, ensure_ascii=False) for text, target in pairs)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clone", type=Path, help="of sonos/nlu-benchmark")
    parser.add_argument("--output", type=Path, default=Path("stranger"))
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    train = list(commands(options.clone, "train_{intent}_full"))
    known = {text.lower() for text, _ in train}
    unseen = [made for made in commands(options.clone, "validate_{intent}") if made[0].lower() not in known]
    drawn = random.Random(options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    chosen = drawn.sample(train, 300)
    for number in range(3):
        write(options.output / f"train{number + 1}.jsonl", chosen[100 * number : 100 * (number + 1)])
    write(options.output / "test.jsonl", drawn.sample(unseen, 200))


if __name__ == "__main__":
    main()
