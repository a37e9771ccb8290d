"""The papers' mathematics as pure functions of arrays and pytrees, for models and training loops of any kind.

Importing it loads jax, optax and jaxtyping, and nothing else of jaxcl.

- DAS, the paper's version: `gate_gradients`, `ImportanceSums`, `normalise`, `accumulate`, `soft_masks`,
  `masked_optimizer`, `clip_by_what_moves`, `pool`, `contrast`
- DAS, second version: `RowColumn`, `Sides`, `select`, `importance_masks`, `elastic_optimizer`
- SEEKR: `watch`, `HeadSums`, `combine`, `select_heads`, `sample_queries`, `selected_rows`, `attention_maps`,
  `attention_divergence`
- SEEKR by modality: `split_divergence`, `watch_blocks`, `block_squares`, `select_by_block`
- Distillation of outputs: `top_scores`, `top_divergence`, `full_divergence`
- Elastic weight consolidation: `FisherSums`, `summed_squares`, `quadratic_penalty`
- What a step leaves out: `without_conflict`, `leading_directions`, `outside`, `orthogonal_optimizer`, `largest_moments`
- Several clients, one model: `server_step`, `adaptive_server`, `proximal`, `scaffold`, `clip_update`, `noised_mean`,
  `add_pair_masks`, `unmasked_sum`
- Averages of params: `averaged`, `restart_average`, `finish_average`
- Losses: `Term`, `Balance`, `cross_entropy`, `token_losses`, `over_positions`
- What was kept and what was forgotten: `ContinualMatrix`
"""

from jaxcl.functional.attention_distillation import (
    AttentionTeacher,
    attention_divergence,
    example_divergence,
    heads_of_layers,
    write_rows,
)
from jaxcl.functional.attention_rows import (
    AttentionView,
    CodedRows,
    attention_maps,
    decode_rows,
    encode_rows,
    sample_queries,
    selected_rows,
    visible_keys,
)
from jaxcl.functional.averaging import averaged, finish_average, restart_average
from jaxcl.functional.balance import Balance
from jaxcl.functional.client_drift import (
    Proximal,
    Scaffold,
    common_variate,
    finish_scaffold,
    proximal,
    scaffold,
    start_proximal,
    start_scaffold,
)
from jaxcl.functional.contrastive import contrast, pool
from jaxcl.functional.distillation import TopScores, divergence, full_divergence, top_divergence, top_scores
from jaxcl.functional.elastic_pull import elastic_optimizer, preconditioner_scale, pulled
from jaxcl.functional.federated import (
    AdaptiveServer,
    ClientMean,
    adaptive_server,
    clip_update,
    combine_shared,
    noised_mean,
    pseudo_gradient,
    server_step,
    why_refused,
)
from jaxcl.functional.fisher import FisherSums, drawn_tokens, quadratic_penalty, summed_squares
from jaxcl.functional.head_values import ValueTeacher, head_values, value_divergence, write_values
from jaxcl.functional.heads import HeadSums, combine, normalise_sensitivity, resolve_budget, select_heads, watch
from jaxcl.functional.importance import (
    ImportanceSums,
    accumulate,
    gate_gradients,
    normalise,
    normalise_quantile,
    normalise_tanh,
)
from jaxcl.functional.largest_moments import largest_entries, largest_moments
from jaxcl.functional.losses import (
    cross_entropy,
    example_means,
    over_positions,
    real_length,
    scored_states,
    token_gates,
    token_losses,
)
from jaxcl.functional.matrix import ContinualMatrix
from jaxcl.functional.modalities import (
    BLOCKS,
    MODALITIES,
    PartWeights,
    SplitDivergence,
    block_squares,
    select_by_block,
    split_divergence,
    split_slopes,
    watch_blocks,
)
from jaxcl.functional.projection import (
    Directions,
    leading_directions,
    orthogonal_optimizer,
    outside,
    without_conflict,
)
from jaxcl.functional.row_column import RowColumn, Sides, importance_masks, select, unit_means
from jaxcl.functional.secure_sum import add_pair_masks, from_fixed_point, to_fixed_point, unmasked_sum
from jaxcl.functional.soft_masks import (
    LAYER,
    Unit,
    clip_by_what_moves,
    masked_decay,
    masked_optimizer,
    soft_mask,
    soft_masks,
)
from jaxcl.functional.terms import Term, Terms

__all__ = [
    "BLOCKS",
    "LAYER",
    "MODALITIES",
    "AdaptiveServer",
    "AttentionTeacher",
    "AttentionView",
    "Balance",
    "ClientMean",
    "CodedRows",
    "ContinualMatrix",
    "Directions",
    "FisherSums",
    "HeadSums",
    "ImportanceSums",
    "PartWeights",
    "Proximal",
    "RowColumn",
    "Scaffold",
    "Sides",
    "SplitDivergence",
    "Term",
    "Terms",
    "TopScores",
    "Unit",
    "ValueTeacher",
    "accumulate",
    "adaptive_server",
    "add_pair_masks",
    "attention_divergence",
    "attention_maps",
    "averaged",
    "block_squares",
    "clip_by_what_moves",
    "clip_update",
    "combine",
    "combine_shared",
    "common_variate",
    "contrast",
    "cross_entropy",
    "decode_rows",
    "divergence",
    "drawn_tokens",
    "elastic_optimizer",
    "encode_rows",
    "example_divergence",
    "example_means",
    "finish_average",
    "finish_scaffold",
    "from_fixed_point",
    "full_divergence",
    "gate_gradients",
    "head_values",
    "heads_of_layers",
    "importance_masks",
    "largest_entries",
    "largest_moments",
    "leading_directions",
    "masked_decay",
    "masked_optimizer",
    "noised_mean",
    "normalise",
    "normalise_quantile",
    "normalise_sensitivity",
    "normalise_tanh",
    "orthogonal_optimizer",
    "outside",
    "over_positions",
    "pool",
    "preconditioner_scale",
    "proximal",
    "pseudo_gradient",
    "pulled",
    "quadratic_penalty",
    "real_length",
    "resolve_budget",
    "restart_average",
    "sample_queries",
    "scaffold",
    "scored_states",
    "select",
    "select_by_block",
    "select_heads",
    "selected_rows",
    "server_step",
    "soft_mask",
    "soft_masks",
    "split_divergence",
    "split_slopes",
    "start_proximal",
    "start_scaffold",
    "summed_squares",
    "to_fixed_point",
    "token_gates",
    "token_losses",
    "top_divergence",
    "top_scores",
    "unit_means",
    "unmasked_sum",
    "value_divergence",
    "visible_keys",
    "watch",
    "watch_blocks",
    "why_refused",
    "without_conflict",
    "write_rows",
    "write_values",
]
