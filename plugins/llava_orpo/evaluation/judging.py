"""LLM-as-a-judge: requests, verdicts and their counts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..errors import UserError
from ..files import whole_lines
from ..serving.asking import ask_each
from ..serving.client import ChatClient, RequestFailed, data_url
from .answer_pairs import AnswerPair, tally, tally_text
from .judge_prompt import REMINDER, RULES, TASK, parse_verdict

REQUEST = {"temperature": 0, "max_tokens": 512}
ORDERS = ("ab", "ba")  # which side is shown first
REMINDERS = 2  # how often a judge is asked again for a verdict that can be read
ANSWER_TOKENS = 200  # tokens of a short reasoning with its verdict, for the estimate


@dataclass(frozen=True)
class Asking:
    """Whom to ask and how: the judge's name there, the criteria, fields of the request, requests at a time."""

    client: ChatClient
    model: str
    criteria: str
    request: dict[str, Any]
    concurrency: int


def tasks(pairs: Sequence[AnswerPair], model: str, criteria: str) -> dict[str, tuple[AnswerPair, str]]:
    """{verdict key: (pair, order)} of every verdict that the pairs need: both orders of each, none where identical."""
    return {
        verdict_key(pair, order, model, criteria): (pair, order)
        for pair in pairs
        if not identical(pair)
        for order in ORDERS
    }


def identical(pair: AnswerPair) -> bool:
    """Whether there is nothing to judge: the same answer twice is a tie."""
    return pair.a.strip() == pair.b.strip()


def verdict_key(pair: AnswerPair, order: str, model: str, criteria: str) -> str:
    """Names everything a verdict depends on."""
    text = json.dumps([pair.key, order, model, criteria, RULES, TASK])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_verdicts(path: Path) -> dict[str, dict[str, Any]]:
    """{key: record} of verdicts that could be read; a last line that was cut off is taken off the file."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = whole_lines(data)
    if whole != data:
        path.write_bytes(whole)
    records = [json.loads(line) for line in whole.decode().split("\n") if line]
    return {record["key"]: record for record in records if record["verdict"]}


def confirm(tasks: Iterable[tuple[AnswerPair, str]], done: int, criteria: str, own: dict[str, Any]) -> None:
    """Prints what will be sent and what it may cost, and asks unless `yes` is set. Raises UserError for a no."""
    tasks = list(tasks)
    sizes = [text_tokens(RULES + criteria + TASK + p.question + p.a + p.b) + image_tokens(p.image) for p, _ in tasks]
    tokens_in, tokens_out = sum(sizes), ANSWER_TOKENS * len(tasks)
    print(
        f"{len(tasks)} requests to {own['base_url']} ({done} verdicts are there already), about {tokens_in:,} tokens "
        f"in and {tokens_out:,} out (4 characters a token, images as OpenAI counts them)."
    )
    if own["price_in"] is not None and own["price_out"] is not None:
        cost = (tokens_in * float(own["price_in"]) + tokens_out * float(own["price_out"])) / 1e6
        print(f"About {cost:.2f} US dollars at {own['price_in']} in and {own['price_out']} out per million tokens.")
    if not own["yes"]:
        if not sys.stdin.isatty():
            raise UserError("Nothing was sent. Add yes=true to send without being asked.")
        if input("Send? [y/N] ").strip().lower() not in ("y", "yes"):
            raise UserError("Nothing was sent.")


def text_tokens(text: str) -> int:
    """An estimate: about four characters per token."""
    return len(text) // 4 + 1


def image_tokens(image: Path | None) -> int:
    """OpenAI's rule for high detail: 85, and 170 per 512-pixel tile, fitted to 2048 and a shorter side of 768."""
    if image is None:
        return 0
    with Image.open(image) as opened:
        width, height = opened.size
    scale = min(1.0, 2048 / max(width, height))
    scale = min(scale, 768 / min(width, height))
    return 85 + 170 * math.ceil(width * scale / 512) * math.ceil(height * scale / 512)


async def judge(
    asking: Asking,
    waiting: dict[str, tuple[AnswerPair, str]],
    done: dict[str, dict[str, Any]],
    verdicts: Path,
) -> dict[str, str]:
    """Asks for the waiting verdicts, `asking.concurrency` at a time; each goes to `done` and the file as it comes.

    Returns {key: why it failed}.

    Raises EndpointUnusable, and the same after many failures in a row without a single success.
    """
    failed: dict[str, str] = {}

    def ask(key: str):
        return one_verdict(asking, *waiting[key])

    try:
        with verdicts.open("a", encoding="utf-8") as out, tqdm(total=len(waiting), unit="verdict") as bar:
            async with contextlib.aclosing(ask_each(waiting, ask, asking.concurrency)) as answered:
                async for key, found in answered:
                    bar.update()
                    if isinstance(found, RequestFailed):
                        failed[key] = str(found)
                        continue
                    pair = waiting[key][0]
                    record = {"key": key, "dataset": pair.dataset, "pair_id": pair.pair_id, **found}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    out.flush()
                    if record["verdict"]:
                        done[key] = record
                    else:
                        failed[key] = f"no verdict in: {record['text'][-200:]!r}"
        return failed
    finally:
        await asking.client.close()


async def one_verdict(asking: Asking, pair: AnswerPair, order: str) -> dict[str, Any]:
    """One record: order, verdict ("A", "B", "tie", None), outcome ("a", "b", "tie", None), text, usage, tries."""
    first, second = (pair.a, pair.b) if order == "ab" else (pair.b, pair.a)
    content: list[dict[str, Any]] = [
        {"type": "text", "text": TASK.format(question=pair.question, first=first, second=second)}
    ]
    if pair.image:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(pair.image.read_bytes())}})
    messages = [
        {"role": "system", "content": RULES.format(criteria=asking.criteria)},
        {"role": "user", "content": content},
    ]
    usage, tries = Counter(), 0
    for _ in range(1 + REMINDERS):
        answer = await asking.client.ask({"model": asking.model, "messages": messages, **asking.request})
        usage.update({key: value for key, value in answer["usage"].items() if isinstance(value, int)})
        tries += answer["tries"]
        verdict = parse_verdict(answer["text"])
        if verdict:
            break
        messages += [{"role": "assistant", "content": answer["text"]}, {"role": "user", "content": REMINDER}]
    outcome = {"A": order[0], "B": order[1], "tie": "tie", None: None}[verdict]
    said = {"order": order, "verdict": verdict, "outcome": outcome, "text": answer["text"]}
    return {**said, "usage": usage, "tries": tries}


def summarize(
    pairs: Sequence[AnswerPair], done: dict[str, dict[str, Any]], model: str, criteria: str
) -> dict[str, Any]:
    """Counts of `tally` over the pairs with both verdicts, and how much the order of the answers mattered.

    Adds not_judged; identical (pairs with the same answer twice: a tie that is not sent); orders_disagree (pairs whose
    verdicts name different winners, or one of them a tie) and its `disagreement_rate`; `position_bias_rate` (pairs in
    which the same place won twice), both out of the pairs that were sent; `first_place_share` (out of the verdicts
    without a tie); usage; subsets; outcomes (one line per pair).
    """
    outcomes, by_subset = [], {}
    disagree = same_place = same_text = 0
    places: Counter = Counter()
    usage: Counter = Counter()
    for pair in pairs:
        line = {"key": pair.key, "dataset": pair.dataset, "pair_id": pair.pair_id}
        if identical(pair):
            same_text += 1
            outcomes.append({**line, "outcome": "tie"})
            by_subset.setdefault(pair.subset, []).append("tie")
            continue
        both = [done.get(verdict_key(pair, order, model, criteria)) for order in ORDERS]
        for record in filter(None, both):
            usage.update(record["usage"])
        if None in both:
            continue
        sides = [record["outcome"] for record in both]
        said = [record["verdict"] for record in both]
        places.update(said)
        disagree += sides[0] != sides[1]
        same_place += said[0] == said[1] != "tie"
        outcome = sides[0] if sides[0] == sides[1] else "tie"
        outcomes.append({**line, "outcome": outcome})
        by_subset.setdefault(pair.subset, []).append(outcome)
    n, judged = len(outcomes), len(outcomes) - same_text
    decided = places["A"] + places["B"]
    return {
        **tally([line["outcome"] for line in outcomes]),
        "not_judged": len(pairs) - n,
        "identical": same_text,
        "orders_disagree": disagree,
        "disagreement_rate": disagree / judged if judged else None,
        "position_bias_rate": same_place / judged if judged else None,
        "first_place_share": places["A"] / decided if decided else None,
        "usage": dict(usage),
        "subsets": {name: tally(found) for name, found in sorted(by_subset.items())},
        "outcomes": outcomes,
    }


def print_summary(summary: dict[str, Any], failed: dict[str, str]) -> None:
    """Prints counts, position bias and failures."""
    print(tally_text(summary["a"], summary["b"], summary))
    if summary["identical"]:
        print(f"  identical answers  {summary['identical']}, counted as ties and not sent")
    judged = summary["n"] - summary["identical"]
    if judged:
        print(
            f"  orders disagreed   {summary['orders_disagree']} of {judged}; the same place won twice in "
            f"{summary['position_bias_rate']:.1%}"
        )
    if summary["first_place_share"] is not None:
        print(f"  first place won    {summary['first_place_share']:.1%} of the decided verdicts")
    if summary["not_judged"]:
        print(
            f"  {summary['not_judged']} pairs were not judged; run the command again to try them.",
            file=sys.stderr,
        )
    for reason, count in Counter(failed.values()).most_common(3):
        print(f"  {count} verdicts failed: {reason}", file=sys.stderr)
