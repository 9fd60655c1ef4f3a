"""Flow matching: paths, couplings, losses, solvers and what they are worth.

paths          x_t and u_t between source (t = 0) and data (t = 1); conversions between velocity, x1, noise, score
couplings      independent, Gibbs-weighted (W-CFM), Sinkhorn-corrected, minibatch optimal transport
times          how training times are drawn
loss           weighted regression of the velocity
solvers        integrate, encode, likelihood, guidance, SDE
diagnostics    effective sample size, tilt, path energy, distances
velocity       networks; toy: two-dimensional distributions
"""

from flowgen.matching import toy
from flowgen.matching.couplings import Coupled, GibbsWeights, Independent, MinibatchOT, sinkhorn_potentials
from flowgen.matching.diagnostics import (
    choose_epsilon,
    effective_sample_size,
    path_report,
    signed_path_energy,
    wasserstein,
    weight_report,
)
from flowgen.matching.loss import flow_matching_loss
from flowgen.matching.paths import (
    CondOT,
    PathSample,
    Polynomial,
    Schedule,
    SchroedingerBridge,
    Target,
    Trigonometric,
    VariancePreserving,
    noise_of,
    score_of,
    velocity_of,
    x1_of,
)
from flowgen.matching.solvers import guided, integrate, integrate_sde, log_prob, trajectory
from flowgen.matching.times import LogitNormal, Shifted, Uniform
from flowgen.matching.velocity import MLPConfig, VelocityMLP, time_features

__all__ = [
    "CondOT",
    "Coupled",
    "GibbsWeights",
    "Independent",
    "LogitNormal",
    "MLPConfig",
    "MinibatchOT",
    "PathSample",
    "Polynomial",
    "Schedule",
    "SchroedingerBridge",
    "Shifted",
    "Target",
    "Trigonometric",
    "Uniform",
    "VariancePreserving",
    "VelocityMLP",
    "choose_epsilon",
    "effective_sample_size",
    "flow_matching_loss",
    "guided",
    "integrate",
    "integrate_sde",
    "log_prob",
    "noise_of",
    "path_report",
    "score_of",
    "signed_path_energy",
    "sinkhorn_potentials",
    "time_features",
    "toy",
    "trajectory",
    "velocity_of",
    "wasserstein",
    "weight_report",
    "x1_of",
]
