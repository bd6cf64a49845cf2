"""The names of :mod:`cod_async.learner.rows` that the rest of the learner uses."""

from cod_async.learner.rows.balance import RowCost as RowCost
from cod_async.learner.rows.balance import assign as assign
from cod_async.learner.rows.balance import balance_of as balance_of
from cod_async.learner.rows.batches import MicroBatch as MicroBatch
from cod_async.learner.rows.batches import filler as filler
from cod_async.learner.rows.batches import lay_out as lay_out
from cod_async.learner.rows.batches import micro_batches as micro_batches
from cod_async.learner.rows.flat import FlatRows as FlatRows
from cod_async.learner.rows.flat import split_lifecycles as split_lifecycles
from cod_async.learner.rows.flatten import MAX_LOGPROB as MAX_LOGPROB
from cod_async.learner.rows.flatten import flatten as flatten
from cod_async.learner.rows.merging import merging_metrics as merging_metrics
from cod_async.learner.rows.plans import MicroBatchPlan as MicroBatchPlan
from cod_async.learner.rows.plans import choose_layout as choose_layout
from cod_async.learner.rows.plans import layout_metrics as layout_metrics
from cod_async.learner.rows.plans import plan_micro_batches as plan_micro_batches
from cod_async.learner.rows.plans import row_metrics as row_metrics
from cod_async.learner.rows.plans import token_budget as token_budget
from cod_async.learner.rows.rectangles import MAX_BUCKET_TOKENS as MAX_BUCKET_TOKENS
from cod_async.learner.rows.rectangles import RECTANGLE_OVERHEAD_TOKENS as RECTANGLE_OVERHEAD_TOKENS
from cod_async.learner.rows.rectangles import rectangles as rectangles
from cod_async.models.transfer import upload as upload
