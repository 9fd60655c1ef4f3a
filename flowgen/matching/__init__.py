"""Flow matching: paths, couplings, losses, solvers and diagnostics.

paths          points x_t and velocities u_t between noise (t = 0) and data (t = 1)
conversions    between velocities and predictions of x1, noise or score; from one path to another
plans          transport plans over a batch: optimal assignment, Sinkhorn
couplings      independent, Gibbs-weighted (W-CFM), Sinkhorn-corrected, minibatch optimal transport
distilled      the coupling of a trained autoregressive flow (NFM)
semidiscrete   optimal transport from noise to a whole dataset
times          distributions of training times
loss           weighted regression of the velocity
bridge         regression of the velocity and the score ([SF]²M)
mean_flow      average velocities, for sampling in one step
objective      the training config and objective
solvers        integration of ODEs in both directions, integration of SDEs, guidance
likelihood     log-density and divergence
diagnostics    effective sample size, tilt, choice of epsilon, path energy, distances
velocity       a network for points, and the interface for your own networks
dit, unet      networks for images
toy            two-dimensional distributions
"""

from flowgen.matching import toy
from flowgen.matching.bridge import score_and_flow_matching_loss
from flowgen.matching.conversions import (
    change_path,
    clip_times,
    prediction_to_velocity,
    time_of_ratio,
    velocity_to_noise,
    velocity_to_score,
    velocity_to_x1,
)
from flowgen.matching.couplings import (
    Coupled,
    Coupling,
    FromFlow,
    GibbsWeights,
    Independent,
    MinibatchOT,
    to_sphere,
)
from flowgen.matching.diagnostics import (
    PathReport,
    TiltedDistances,
    WeightReport,
    choose_epsilon,
    fit_epsilon,
    path_report,
    resample,
    signed_path_energy,
    tilted_wasserstein,
    warn_if_tilted,
    wasserstein,
    weight_report,
)
from flowgen.matching.distilled import FlowDistilled
from flowgen.matching.dit import DiT, DiTConfig
from flowgen.matching.likelihood import divergence, log_prob
from flowgen.matching.loss import Pairs, draw_pairs, flow_matching_loss
from flowgen.matching.mean_flow import integrate_mean, mean_flow_loss
from flowgen.matching.objective import (
    FlowMatching,
    MatchingConfig,
    MeanFlow,
    matching_objective,
    velocity_field,
)
from flowgen.matching.paths import (
    CondOT,
    LinearVariancePreserving,
    Path,
    PathSample,
    Polynomial,
    Schedule,
    SchroedingerBridge,
    Target,
    Trigonometric,
    VariancePreserving,
)
from flowgen.matching.plans import sinkhorn_potentials
from flowgen.matching.semidiscrete import SemidiscreteFit, SemidiscreteOT, fit_semidiscrete
from flowgen.matching.solvers import edm_times, guided, integrate, integrate_sde, trajectory
from flowgen.matching.times import LogitNormal, Shifted, Uniform
from flowgen.matching.unet import UNet, UNetConfig
from flowgen.matching.velocity import MLPConfig, NetworkConfig, OwnNetwork, VelocityMLP
from flowgen.weights import effective_sample_size

# The networks that an experiment can train; add new ones here.
AnyNetwork = MLPConfig | DiTConfig | UNetConfig | OwnNetwork

__all__ = [
    "AnyNetwork",
    "CondOT",
    "Coupled",
    "Coupling",
    "DiT",
    "DiTConfig",
    "FlowDistilled",
    "FlowMatching",
    "FromFlow",
    "GibbsWeights",
    "Independent",
    "LinearVariancePreserving",
    "LogitNormal",
    "MLPConfig",
    "MatchingConfig",
    "MeanFlow",
    "MinibatchOT",
    "NetworkConfig",
    "Pairs",
    "Path",
    "PathReport",
    "PathSample",
    "Polynomial",
    "Schedule",
    "SchroedingerBridge",
    "SemidiscreteFit",
    "SemidiscreteOT",
    "Shifted",
    "Target",
    "TiltedDistances",
    "Trigonometric",
    "UNet",
    "UNetConfig",
    "Uniform",
    "VariancePreserving",
    "VelocityMLP",
    "WeightReport",
    "change_path",
    "choose_epsilon",
    "clip_times",
    "divergence",
    "draw_pairs",
    "edm_times",
    "effective_sample_size",
    "fit_epsilon",
    "fit_semidiscrete",
    "flow_matching_loss",
    "guided",
    "integrate",
    "integrate_mean",
    "integrate_sde",
    "log_prob",
    "matching_objective",
    "mean_flow_loss",
    "path_report",
    "prediction_to_velocity",
    "resample",
    "score_and_flow_matching_loss",
    "signed_path_energy",
    "sinkhorn_potentials",
    "tilted_wasserstein",
    "time_of_ratio",
    "to_sphere",
    "toy",
    "trajectory",
    "velocity_field",
    "velocity_to_noise",
    "velocity_to_score",
    "velocity_to_x1",
    "warn_if_tilted",
    "wasserstein",
    "weight_report",
]
