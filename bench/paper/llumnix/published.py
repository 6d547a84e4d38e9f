"""What did Llumnix's paper find? Its figures, as far as its text and its plots tell them (read off: a few per cent)."""

from __future__ import annotations

DOWNTIME_MS = {
    256: (13.0, 68.0, 58.0),
    512: (12.0, 129.0, 110.0),
    1024: (15.0, 226.0, 220.0),
    2048: (16.0, 451.0, 436.0),
    4096: (22.0, 909.0, 940.0),
    8192: (26.0, 1682.0, 1995.0),
}
"""LLaMA-7B on A10s: by tokens, of a live migration, of copying while the request stands still, of computing anew."""

SERVING = {
    "S-S": "P99 prefill 71.7 -> 74.5 s (worse)",
    "M-M": "prefill 5.905 -> 0.762 s, P99 240 -> 18.1 s",
    "L-L": "P99 prefill 41.2 -> 2.78 s",
    "S-L": "P99 prefill 134 -> 52 s",
    "L-S": "P99 prefill 205.8 -> 74.0 s",
}
"""INFaaS++ to Llumnix, at the highest rates."""

FRAGMENTATION = "7.9 % -> 0.7 % of memory free but of no use to the heads of the queues (INFaaS++ -> Llumnix)"

PRIORITY = {
    2.0: "urgent 1.2 .. 1.5x over all CVs; normal P99 prefill +30 %",
    4.0: "normal P99 prefill +46 %",
    6.0: "normal P99 prefill -9 %",
    8.0: "normal P99 prefill +26 %",
}
"""Mean latency of urgent requests, without priorities over with them."""

SCALING = "20.7 % fewer instances at a P99 prefill of 5 s (its 36 % are between unequal tails)"
SCALE = "64 instances: a centralised scheduler stalls up to 40 ms an iteration, theirs does not"
