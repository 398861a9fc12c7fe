"""Prompts with images on a server that prefills and decodes: suspended behind the encoder, they change nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.images import IMAGE_TOKEN, IMAGE_TOKENS, Image, write_checkpoint
from tests.prompts import prompt
from tests.remote import Remote
from tests.unified_asks import Ask
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_rounds import Rounds

pytestmark = [pytest.mark.stress, pytest.mark.timeout(1800)]

ROUNDS = 10


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory: Path = tmp_path_factory.mktemp("images")
    write_checkpoint(directory)
    return str(directory)


@pytest.fixture(scope="module")
def stock(checkpoint: str) -> Iterator[Stock]:
    with closing(Remote(StockEngine, checkpoint, skip_tokenizer_init=True)) as remote:
        yield Stock(remote)


@pytest.fixture(scope="module")
def unified(checkpoint: str) -> Iterator[Remote]:
    with closing(Remote(UnifiedEngine, checkpoint, skip_tokenizer_init=True)) as remote:
        yield remote


def asks_with_images(count: int) -> list[Ask]:
    """Every third is text only; some share their text before an image, and some the image, too."""
    rng = random.Random(5)
    made = []
    for number in range(count):
        tokens = prompt(900 + number, rng.choice((60, 200, 500, 900)), prompt(899, 40))
        image = None if number % 3 == 0 else Image(seed=rng.randrange(6), begin=rng.choice((0, 25, 40)))
        if image is not None:
            tokens[image.begin : image.begin + IMAGE_TOKENS] = [IMAGE_TOKEN] * IMAGE_TOKENS
        made.append(Ask(tuple(tokens), rng.randrange(2, 16), (("ignore_eos", True),), image=image))
    return made


def test_an_image_counts(stock: Stock) -> None:
    [ask] = [ask for ask in asks_with_images(2) if ask.image is not None]
    other = Ask(ask.prompt, ask.max_new_tokens, ask.sampling, image=Image(77, ask.image.begin if ask.image else 0))
    answers = stock.answers([ask, other])
    assert answers[ask].logprobs != answers[other].logprobs, "if images do not count, nothing here shows anything"


def test_prompts_with_images_are_suspended_and_stepped_beside_without_changing_an_answer(
    unified: Remote, stock: Stock
) -> None:
    comparison = StockComparison(stock)
    rounds = Rounds(unified, comparison, asks_with_images(30))
    rounds.run(ROUNDS)
    print(rounds)
    assert rounds.seen["steps inside prefills"] >= 50
    assert rounds.seen["suspensions"] >= 50
    assert comparison.counts["answers"] >= 3 * ROUNDS
