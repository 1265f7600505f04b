"""`nsattn bench`: times beside what a user would run instead.

Results are checked before they are timed; of models those with a peer's attention, ours are the business of the tests.

attention: every operation, forward and backward, beside dense attention.
selected:  selected attention alone, over the shapes of `cases.py`, beside the peers of `peers/`.
decode:    the attention of one decoding step, beside dense attention over the same cache.
model:     training steps, prefill and decoding steps of model shapes, with dense attention and with NSA.
plot:      the pictures of a results file.
paper:     docs/paper.md, the claims of the FSA paper beside what was measured.
repeat:    whether two runs agree, ratio by ratio.
all:       all of these in one folder, in as many sittings as it takes (`whole.py`, `session.py`).

The first three can time another commit of ours beside this one (`base.py`).

Timing (`timing.py`): device events, a cold L2 cache, medians with the 20th and 80th percentile, and a pause before each
measurement, because these kernels run into the power limit and drift when timed back to back.

The floor of a row is arithmetic: useful FLOPs (selected keys only, causal halves counted once) at the matrix rate and
unique bytes (each input read once, each output written once) at the copy rate that were measured on an H200.
"""

from nsattn.bench.attention import run as run_attention
from nsattn.bench.attention import summary
from nsattn.bench.selected import run as run_selected
from nsattn.bench.selected import summary as selected_summary

__all__ = ["run_attention", "run_selected", "selected_summary", "summary"]
