"""The objectives that SGLang frontend programs send, by a server that keeps what it is sent."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import sglang as sgl

from sgl_flowprefill.frontend import PREFIX_TTFT_SLO_S, SLORuntimeEndpoint, ttft_slo
from sgl_flowprefill.slo import SloError
from tests.http_server import answering_bodies

LAX = {"ttft_slo": PREFIX_TTFT_SLO_S}
TIGHT = {"ttft_slo": 0.3, "tbt_slo": 0.05}


class Server:
    """Answers every prompt with " ok", and keeps the requests in the order in which they came."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.scored: Callable[[dict[str, Any]], list[Any]] = lambda body: [[-1.0, 1, " a"], [-2.0, 2, " b"]]
        """What it says of the tokens of a prompt."""

    def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> tuple[int, str]:
        if path != "/generate":
            return 200, json.dumps({"model_path": "embedded"})
        request = json.loads(body)
        self.bodies.append(request)
        logprobs = self.scored(request) if request.get("return_logprob") else []
        meta_info = {"prompt_tokens": 2, "input_token_logprobs": logprobs, "output_token_logprobs": []}
        answer = json.dumps({"text": " ok", "meta_info": meta_info})
        return 200, f"data: {answer}\n\ndata: [DONE]\n\n" if request.get("stream") else answer

    def objectives(self) -> dict[str, Any]:
        """Each prompt that was sent, with its objective; without an objective, None."""
        sent = [(body["text"], body["sampling_params"]["custom_params"]) for body in self.bodies]
        assert len(dict(sent)) == len(sent), sent
        return dict(sent)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    with answering_bodies(server.answer) as url:
        yield url


@pytest.fixture
def endpoint(url: str) -> SLORuntimeEndpoint:
    return SLORuntimeEndpoint(url)


@sgl.function
def program(s: Any, name: str) -> None:
    s += name + ":" + sgl.gen("first")
    s.sync()  # else it depends on a race whether SGLang has the text before a fork cached
    branches = s.fork(2)
    for number, branch in enumerate(branches):
        branch += f" {number}" + sgl.gen("branch")
    s += branches[0]["branch"] + branches[1]["branch"] + sgl.select("choice", choices=[" yes", " no"])


def wait_for(state: Any, name: str) -> Any:
    """The variable ``name`` of a program, which may be a streamed one."""
    for _ in state.text_iter(name):  # has no pieces once the program has ended
        pass
    return state[name]


def expected(name: str, objective: Any) -> dict[str, Any]:
    """What ``program`` sends."""
    forked, joined = f"{name}: ok", f"{name}: ok ok ok"
    answers = [f"{name}:", f"{forked} 0", f"{forked} 1", joined, f"{joined} yes", f"{joined} no"]
    return dict.fromkeys(answers, objective) | {forked: LAX}


def test_every_request_of_a_program_has_the_objective_and_those_without_output_a_lax_one(
    server: Server, endpoint: SLORuntimeEndpoint
) -> None:
    with ttft_slo(0.3, tbt=0.05):
        state = program.run(name="run", backend=endpoint)
    assert state.text().startswith("run: ok ok ok")  # executed in a thread that outlives the with
    assert server.objectives() == expected("run", TIGHT)


def test_the_branches_of_a_streamed_program_have_it_too(server: Server, endpoint: SLORuntimeEndpoint) -> None:
    """SGLang runs the function of a streamed program, which forks, in a thread without a context."""
    with ttft_slo(0.3, tbt=0.05):
        state = program.run(name="stream", backend=endpoint, stream=True)
    assert wait_for(state, "choice") == " yes"
    assert server.objectives() == expected("stream", TIGHT)
    assert sum(body.get("stream", False) for body in server.bodies) == 3


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("generator_style", [False, True])
def test_a_batch_has_it_also_where_its_answers_are_read_later(
    server: Server, endpoint: SLORuntimeEndpoint, num_threads: int, generator_style: bool
) -> None:
    names = [f"{'shared ' * 20}{number}" for number in range(3)]
    with ttft_slo(0.3, tbt=0.05):
        batch = program.run_batch(
            [{"name": name} for name in names],
            backend=endpoint,
            num_threads=num_threads,
            generator_style=generator_style,
        )
    assert len(list(batch)) == 3
    wanted: dict[str, Any] = {}
    for name in names:
        wanted |= expected(name, TIGHT)
    assert server.objectives() == wanted


def test_a_batch_of_one_thread_keeps_its_objective_when_it_is_read_within_another(
    server: Server, endpoint: SLORuntimeEndpoint
) -> None:
    @sgl.function
    def forks(s: Any, name: str) -> None:
        s += name + sgl.gen("first")
        with ttft_slo(20.0):
            [branch] = s.fork(1).states
        branch += " branch" + sgl.gen("second")
        s += branch["second"]

    with ttft_slo(0.3):
        batch = forks.run_batch([{"name": "a"}, {"name": "b"}], backend=endpoint, num_threads=1, generator_style=True)
    with ttft_slo(9.0):
        assert len(list(batch)) == 2
    tight, inner = {"ttft_slo": 0.3}, {"ttft_slo": 20.0}
    assert server.objectives() == {"a": tight, "a ok branch": inner, "b": tight, "b ok branch": inner}


@pytest.mark.parametrize(
    "method",
    [sgl.token_length_normalized, sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized],
    ids=lambda method: type(method).__name__,
)
def test_select_decides_where_the_token_before_the_prompts_last_could_end_the_prompt_too(
    server: Server, endpoint: SLORuntimeEndpoint, method: Any
) -> None:
    """Servers say no log probability of it, and SGLang's frontend takes it for the prompt's last."""
    prompt, of_choices = [[None, 7, "2"], [-1.0, 7, "2"]], {" yes": [-0.5, 8, " yes"], " no": [-3.0, 9, " no"]}

    def scored(body: dict[str, Any]) -> list[Any]:
        return [*prompt, of_choices[body["text"].removeprefix("22")] if "text" in body else [-2.0, 8, ""]]

    @sgl.function
    def program(s: Any) -> None:
        s += "22"
        s += sgl.select("choice", choices=[" no", " yes"], choices_method=method)

    server.scored = scored
    state = program.run(backend=endpoint)
    assert state["choice"] == " yes"
    about = state.get_meta_info("choice")
    assert about["input_token_logprobs"] == [[of_choices[" no"]], [of_choices[" yes"]]]
    assert about["normalized_prompt_logprobs"] == [-2.0, -0.75], "with the prompt's last token, as everywhere"


def test_a_prefix_that_a_batch_shares_is_cached_with_a_lax_objective(
    server: Server, endpoint: SLORuntimeEndpoint
) -> None:
    prefix = "shared " * 20

    @sgl.function
    def question(s: Any, text: str) -> None:
        s += prefix
        s += text + sgl.gen("answer")

    with ttft_slo(0.3):
        question.run_batch([{"text": "one"}, {"text": "two"}], backend=endpoint)
    tight = {"ttft_slo": 0.3}
    assert server.objectives() == {prefix: LAX, prefix + "one": tight, prefix + "two": tight}
    assert server.bodies[0]["sampling_params"]["max_new_tokens"] == 0


@pytest.mark.parametrize(("own_s", "prefix_s"), [(300.0, 300.0), (None, PREFIX_TTFT_SLO_S), (0.3, PREFIX_TTFT_SLO_S)])
def test_a_lax_objective_is_no_tighter_than_the_programs_own(
    server: Server, endpoint: SLORuntimeEndpoint, own_s: float | None, prefix_s: float
) -> None:
    with ttft_slo(own_s):
        endpoint.cache_prefix("prefix")
    assert server.objectives() == {"prefix": {"ttft_slo": prefix_s}}


def test_what_counts_as_lax_can_be_said(server: Server, url: str) -> None:
    with ttft_slo(0.3):
        SLORuntimeEndpoint(url, prefix_ttft_slo=1.5).cache_prefix("prefix")
    assert server.objectives() == {"prefix": {"ttft_slo": 1.5}}


def test_programs_that_run_side_by_side_keep_their_own_objectives(server: Server, endpoint: SLORuntimeEndpoint) -> None:
    together = threading.Barrier(4)

    def one(name: str, slo_s: float, stream: bool) -> None:
        with ttft_slo(slo_s):
            together.wait(60)
            state = program.run(name=name, backend=endpoint, stream=stream)
            together.wait(60)
        assert wait_for(state, "choice") == " yes"

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, "abcd", (1.0, 2.0, 3.0, 4.0), (False, True, False, True)))
    wanted: dict[str, Any] = {}
    for name, slo_s in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True):
        wanted |= expected(name, {"ttft_slo": slo_s})
    assert server.objectives() == wanted


def test_asyncio_tasks_have_an_objective_each(server: Server, endpoint: SLORuntimeEndpoint) -> None:
    async def one(name: str, slo_s: float) -> None:
        with ttft_slo(slo_s):
            await asyncio.sleep(0)
            state = program.run(name=name, backend=endpoint, stream=True)
            async for _ in state.text_async_iter("choice"):
                pass

    async def both() -> None:
        await asyncio.gather(one("a", 1.0), one("b", 2.0))

    asyncio.run(both())
    assert server.objectives() == expected("a", {"ttft_slo": 1.0}) | expected("b", {"ttft_slo": 2.0})


@pytest.mark.parametrize("stream", [False, True])
def test_branches_that_a_program_forks_inside_have_the_inner_objective(
    server: Server, endpoint: SLORuntimeEndpoint, stream: bool
) -> None:
    @sgl.function
    def outer(s: Any) -> None:
        s += "outer:" + sgl.gen("first")
        with ttft_slo(20.0):
            [branch] = s.fork(1).states
        branch += " branch:" + sgl.gen("second")
        s += branch["second"] + sgl.gen("third")

    with ttft_slo(0.3):
        state = outer.run(backend=endpoint, stream=stream)
    assert wait_for(state, "third") == " ok"
    tight = {"ttft_slo": 0.3}
    sent = {"outer:": tight, "outer: ok branch:": {"ttft_slo": 20.0}, "outer: ok ok": tight}
    assert server.objectives() == sent


def test_outside_of_any_with_the_endpoints_own_objective_holds_and_inside_the_innermost(
    server: Server, url: str
) -> None:
    @sgl.function
    def one(s: Any, name: str) -> None:
        s += name + sgl.gen("answer")

    endpoint = SLORuntimeEndpoint(url, ttft_slo=2.0, tbt_slo=0.2)
    one.run(name="before", backend=endpoint).sync()
    with ttft_slo(0.3, tbt=0.05):
        with ttft_slo(9.0):
            one.run(name="inner", backend=endpoint).sync()
        with ttft_slo(None):
            one.run(name="the server's", backend=endpoint).sync()
        one.run(name="outer", backend=endpoint).sync()
        with pytest.raises(ZeroDivisionError), ttft_slo(9.0):
            _ = 1 / 0
        one.run(name="outer again", backend=endpoint).sync()
    one.run(name="after", backend=endpoint).sync()
    own = {"ttft_slo": 2.0, "tbt_slo": 0.2}
    assert server.objectives() == {
        "before": own,
        "inner": {"ttft_slo": 9.0},
        "the server's": None,
        "outer": TIGHT,
        "outer again": TIGHT,
        "after": own,
    }


@pytest.mark.parametrize("slo", [0, -1.0, float("nan"), float("inf"), True])
def test_an_objective_that_is_no_positive_number_is_refused_before_anything_is_sent(slo: float) -> None:
    nobody = "http://127.0.0.1:9"
    with pytest.raises(SloError, match=r'"ttft_slo"\] must be a positive'), ttft_slo(slo):
        pass
    with pytest.raises(SloError, match=r'"tbt_slo"\] must be a positive'), ttft_slo(1.0, tbt=slo):
        pass
    for name in ("ttft_slo", "tbt_slo", "prefix_ttft_slo"):
        with pytest.raises(SloError, match="positive"):
            SLORuntimeEndpoint(nobody, **{name: slo})
