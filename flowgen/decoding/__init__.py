"""Inversion of autoregressive flows: sequential and parallel decoding, guidance and sampling."""

from flowgen.decoding.affine_draft import fit_affine_draft
from flowgen.decoding.clips import Clip
from flowgen.decoding.costs import DeviceSpeed, PassCost, device_speed, pass_cost, predicted_cost
from flowgen.decoding.draft import Draft
from flowgen.decoding.plan import DecodePlan, Jacobi, LowPrecision, Sequential, SlidingWindow, resolve_plan
from flowgen.decoding.request import DecodeResult, Denoiser
from flowgen.decoding.sampler import invert, sample, sample_and_log_prob
from flowgen.decoding.tuning import Measurement, Tuning, measure_plans, tune
from flowgen.guidance import Guidance, linear_rule, product_rule

__all__ = [
    "Clip",
    "DecodePlan",
    "DecodeResult",
    "Denoiser",
    "DeviceSpeed",
    "Draft",
    "Guidance",
    "Jacobi",
    "LowPrecision",
    "Measurement",
    "PassCost",
    "Sequential",
    "SlidingWindow",
    "Tuning",
    "device_speed",
    "fit_affine_draft",
    "invert",
    "linear_rule",
    "measure_plans",
    "pass_cost",
    "predicted_cost",
    "product_rule",
    "resolve_plan",
    "sample",
    "sample_and_log_prob",
    "tune",
]
