"""What the numbers say: five ratios, and where a peer is ahead of SENSE."""

from .measure import quartiles
from .systems import AT_ONCE, BARE, BEAMS, CACHED, ENCODING, PEERS, PER_BEAM, THREE_CALLS


MEANING = {
    "cached_step_vs_bare_llm": "time of SENSE's training step from the cache / of the bare LLM's (limit: 1)",
    "train_vs_fastest_peer": "clips a second in training, SENSE from the cache / the fastest peer (more is better)",
    "beam5_vs_encode_per_beam": "time of SENSE's beam search / of one with the encoder run per beam (less is better)",
    "understand_vs_three_calls": "time of one call for three answers / of three of generate (less is better)",
    "peak_memory_vs_limit": "peak memory of training from the cache / (bare LLM's step + AdamW's state) (limit: 1)",
}


def ratios(results: dict) -> dict[str, float | None]:
    """The five of `MEANING`: ratios of medians. None where the section was not run."""
    times = time_ratios(results)
    found = {name: times[name]["ratio"] if name in times else None for name in MEANING}
    if memory := results.get("memory"):
        sense, bare = memory["limit"][CACHED], memory["limit"][BARE]
        found["peak_memory_vs_limit"] = sense["peak_bytes"] / (bare["peak_bytes"] + sense["optimizer_bytes"])
    return found


def time_ratios(results: dict) -> dict[str, dict]:
    """By name of the ratio: `ratio` of the medians, and `iqr` of the ratios of each round."""
    pairs = {}
    if train := results.get("train"):
        peer = fastest_peer(train["systems"])
        pairs["cached_step_vs_bare_llm"] = (train, CACHED, BARE)
        pairs["train_vs_fastest_peer"] = (train, peer, CACHED)
    if beams := results.get("beams"):
        pairs["beam5_vs_encode_per_beam"] = (beams, BEAMS, PER_BEAM)
    if understand := results.get("understand"):
        pairs["understand_vs_three_calls"] = (understand, AT_ONCE, THREE_CALLS)
    return {name: time_ratio(section["systems"], above, below) for name, (section, above, below) in pairs.items()}


def time_ratio(systems: dict, above: str, below: str) -> dict:
    rounds = [a / b for a, b in zip(systems[above]["repeats_s"], systems[below]["repeats_s"])]
    return {"ratio": systems[above]["median_s"] / systems[below]["median_s"], "iqr": quartiles(rounds)}


def fastest_peer(systems: dict) -> str:
    return min((name for name in systems if name in PEERS), key=lambda name: systems[name]["median_s"])


def peer_wins(results: dict) -> list[str]:
    """A sentence for each peer that takes less time or memory than SENSE does, in either of its ways to train."""
    wins = []
    for section, ours in (("train", (CACHED, ENCODING)), ("beams", (BEAMS,)), ("understand", (AT_ONCE,))):
        if section in results:
            seconds = {name: result["median_s"] for name, result in results[section]["systems"].items()}
            wins += ahead(seconds, ours, f"{section}: {{peer}} takes {{share:.2f}} of the time of {{name}}")
    if "memory" in results:
        peak = {name: result["peak_bytes"] for name, result in results["memory"]["train"].items()}
        wins += ahead(peak, (CACHED, ENCODING), "train: {peer} takes {share:.2f} of the memory of {name}")
    return wins


def ahead(costs: dict[str, float], ours: tuple[str, ...], sentence: str) -> list[str]:
    return [
        sentence.format(peer=peer, name=name, share=cost / costs[name])
        for name in ours
        for peer, cost in costs.items()
        if peer in PEERS and cost < costs[name]
    ]
