"""The ports that servers take beside their own, and that no two servers of a launch take the same."""

import inspect
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import pytest
from sglang.srt import server_args as sglang
from sglang.srt.utils.network import get_free_port_below_ephemeral

from sgl_flowprefill.cluster import Ports, StartError, cli, free_ports, machine, preflight
from sgl_flowprefill.cluster.base import LOOPBACK
from sgl_flowprefill.cluster.commands import last_value
from sgl_flowprefill.cluster.free_ports import ANY, JOINT_OFFSETS, choose_ports, free_port

JOINT = ("--tp", "2", "--dp", "2", "--enable-dp-attention")
NEEDS = "with DP attention servers count up by 10, and each takes the ports 13 and 233 to 239 above its own, too"


@pytest.fixture
def in_use(monkeypatch):
    """Addresses and ports at which others listen, instead of those of this machine."""
    found = set()
    monkeypatch.setattr(free_ports, "is_free", lambda host, port: (host, port) not in found)
    return found


def test_sglang_takes_the_ports_that_are_known_of(monkeypatch):
    nccl_port, looked_at = 1, set()
    monkeypatch.setattr(sglang, "wait_port_available", lambda port, name: looked_at.add(port))
    options = SimpleNamespace(
        port=20000,
        nccl_port=nccl_port,
        nnodes=1,
        dist_init_addr=None,
        dp_size=1,
        attn_dp_size=2,
        ep_join_mode=None,
        tokenizer_worker_num=1,
        decoupled_spec_role="null",
    )
    ports = sglang.PortArgs.init_new(options)
    addresses = [value for value in vars(ports).values() if str(value).startswith("tcp://")]
    listened_on = {int(address.rpartition(":")[2]) for address in addresses}
    handshake = options.port + sglang.DP_ATTENTION_HANDSHAKE_PORT_DELTA
    known = {options.port + offset for offset in JOINT_OFFSETS}
    assert {handshake, *listened_on, *looked_at} - {nccl_port} == known


def test_no_port_is_chosen_that_sglang_may_draw_meanwhile():
    drawn = inspect.signature(get_free_port_below_ephemeral).parameters
    assert range(drawn["low"].default, drawn["high"].default + 1) == free_ports.SGLANG_RANDOM
    assert not set(free_ports.FREE_PORTS) & set(free_ports.SGLANG_RANDOM)


@pytest.mark.parametrize(
    ("options", "joint"),
    [
        (JOINT, {"prefill", "decode"}),
        (("--tp", "2", "--attn-dp-size", "2"), {"prefill", "decode"}),
        (("--tp=2", "--attention-data-par=2"), {"prefill", "decode"}),
        (("--prefill-args", " ".join(JOINT)), {"prefill"}),
        (("--decode-args", " ".join(JOINT)), {"decode"}),
        (("--tp", "2"), set()),
    ],
)
def test_no_two_servers_of_a_launch_take_the_same_port(monkeypatch, tmp_path, options, joint):
    monkeypatch.setattr(machine, "gpu_count", lambda: 16)
    monkeypatch.chdir(tmp_path)
    started = ("--prefill", "3", "--decode", "4", "--device", "cuda", "--ports", "0")
    layout = preflight.prepare(cli.parse([*started, *options]))
    ports = Counter([layout.ports.gateway])
    for role, index in layout.servers:
        server = layout.server_options(role, index)
        own = int(last_value(server, "--port"))
        ports.update([own, *(own + offset for offset in JOINT_OFFSETS if role in joint)])
        if role == "prefill":
            ports[int(last_value(server, "--disaggregation-bootstrap-port"))] += 1
    assert set(ports.values()) == {1}
    assert layout.taken == set(ports), "what is chosen later keeps clear of them, too"
    assert set(ports) <= set(free_ports.FREE_PORTS)


def test_ports_at_which_two_servers_with_dp_attention_would_meet_are_refused(in_use):
    ports = Ports(prefill=12000, decode=12001)
    with pytest.raises(StartError) as refused:
        choose_ports(LOOPBACK, ports, joint=["prefill", "decode"])
    assert str(refused.value) == f"port 12234 (decode): {NEEDS}; choose ports further apart"
    assert choose_ports(LOOPBACK, ports, joint=["prefill"]).decode == 12001


@pytest.mark.parametrize(
    ("first", "unified", "joint", "port", "why"),
    [
        (65400, 0, ["unified"], 65633, NEEDS),
        (65535, 2, [], 65536, "2 servers count up from 65535"),
    ],
)
def test_ports_above_the_last_one_are_refused(in_use, first, unified, joint, port, why):
    ports = Ports(unified=first) if unified else Ports(gateway=first)
    with pytest.raises(StartError) as refused:
        choose_ports(LOOPBACK, ports, 0, 0, unified=unified, joint=joint)
    name = "unified" if unified else "gateway"
    assert str(refused.value) == f"port {port} ({name}) is above 65535, the last one: {why}; choose a lower one"


@pytest.mark.parametrize("offset", [0, *JOINT_OFFSETS])
def test_a_server_with_dp_attention_is_not_started_where_a_port_that_it_takes_is_in_use(monkeypatch, in_use, offset):
    in_use.add((ANY if offset else LOOPBACK, 12000 + offset))
    with pytest.raises(StartError, match=rf"port {12000 + offset} is in use \({NEEDS}\); choose another with"):
        choose_ports(LOOPBACK, Ports(gateway=12000), 0, 0, joint=["unified"])
    monkeypatch.setattr(free_ports, "FREE_PORTS", range(12000, 12000 + max(JOINT_OFFSETS) + 1))
    with pytest.raises(StartError, match="no port from"):
        free_port(LOOPBACK, is_joint=True)


def test_no_port_that_was_named_for_one_server_is_chosen_for_another(monkeypatch, in_use):
    monkeypatch.setattr(free_ports, "FREE_PORTS", range(12000, 12004))
    for _ in range(20):
        ports = choose_ports(LOOPBACK, Ports(bootstrap=12000))
        assert {ports.gateway, ports.prefill, ports.decode} == {12001, 12002, 12003}


def test_a_server_that_is_started_again_gets_no_port_of_another_that_is_down(restarting, monkeypatch, in_use):
    """Of three spare ports, it has one, the other has one, and one is left."""
    of_all = [port for one in restarting.members for port in (one.bootstrap, int(one.url.rpartition(":")[2]))]
    spares = set(sorted(set(free_ports.FREE_PORTS) - set(of_all))[:3])
    monkeypatch.setattr(free_ports, "FREE_PORTS", [*of_all, *spares])
    for _ in range(5):
        for member, other in permutations([restarting.first, restarting.second]):
            before = member.bootstrap
            member.server, member.start_at_s = None, 0.0
            restarting.members.check()
            assert member.server is not None
            restarting.members.is_up(member)
            assert member.bootstrap in spares - {before, other.bootstrap}
