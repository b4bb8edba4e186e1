"""A search's answer and what serving its child has shown, as records made by hand."""

from puzzle.engines.intervals import Interval
from puzzle.engines.turns import Measurement, ServedFigures
from puzzle.search.answers import Answer, Figures, Solution

BLOCKS = ["gqa_2+gated_96", "gqa_1+no_op"]


def answer(constraints=()):
    """The child is predicted to be twice as fast, with half the parameters and a quarter cache."""
    parent = Figures(
        throughput_tok_per_s=100.0,
        user_throughput_tok_per_s=10.0,
        latency_s=2.0,
        time_to_first_token_s=0.5,
        inter_token_latency_s=0.1,
        memory_bytes=4400,
        parameters=1000,
        kv_cache_bytes=400,
    )
    child = Figures(
        throughput_tok_per_s=200.0,
        user_throughput_tok_per_s=20.0,
        latency_s=1.0,
        time_to_first_token_s=0.25,
        inter_token_latency_s=0.05,
        memory_bytes=2100,
        parameters=500,
        kv_cache_bytes=100,
    )
    solution = Solution(
        blocks=BLOCKS, objective=1.0, bound=1.0, gap=0.0, seconds=0.1, predicted={"main": child}
    )
    return Answer(
        constraints=list(constraints),
        margin=0.0,
        uncertainty=0.01,
        final=None,
        batch_size=8,
        parent_batch_size=8,
        sweep=[],
        parent={"main": parent},
        solutions=[solution],
    )


def give_or_take(value, share=0.02):
    return Interval(value=value, low=value * (1 - share), high=value * (1 + share))


def side(batch, latency, first, throughput, cache):
    return ServedFigures(
        batch_size=batch,
        latency_s=give_or_take(latency),
        time_to_first_token_s=give_or_take(first),
        inter_token_latency_s=give_or_take((latency - first) / 15),
        throughput_tok_per_s=give_or_take(throughput),
        kv_cache_bytes=cache,
        memory_bytes=None,
    )


SERVED = Measurement(  # the ratios are not the ratios of the sides' figures
    parent=side(8, 2.0, 0.5, 100.0, 480),
    child=side(8, 1.1, 0.3, 180.0, 128),
    speedup=give_or_take(1.9),
    latency_ratio=give_or_take(0.53),
    time_to_first_token_ratio=give_or_take(0.6),
    decode_ratio=give_or_take(0.5),
    starts=3,
    turns=90,
    disturbed=0.0,
    in_turn=True,
)
