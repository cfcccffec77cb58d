"""Distillation points: one idea a file, a pure function and a thin class around it."""

from kdlib.points.attention_transfer import AttentionTransfer, attention_loss
from kdlib.points.correlation import Correlation, correlation_loss
from kdlib.points.crd import Crd, crd_loss
from kdlib.points.dist import Dist, dist_loss
from kdlib.points.dkd import Dkd, dkd_loss
from kdlib.points.fitnet import FitNet, hint_loss
from kdlib.points.fsp import Fsp, fsp_loss
from kdlib.points.hard_labels import HardLabels, hard_cross_entropy
from kdlib.points.hidden_cosine import HiddenCosine, cosine_distance
from kdlib.points.js import JensenShannon, js_loss
from kdlib.points.logit_mse import LogitMse, logit_mse_loss
from kdlib.points.logit_standardised import LogitStandardised, standardised_kl
from kdlib.points.nst import Nst, selectivity_mmd
from kdlib.points.of import of
from kdlib.points.pkt import Pkt, pkt_loss
from kdlib.points.ranking import Ranking, list_mle
from kdlib.points.rkd import Rkd, rkd_loss
from kdlib.points.sigmoid_labels import SigmoidLabels, sigmoid_cross_entropy
from kdlib.points.similarity_preserving import SimilarityPreserving, similarity_preserving_loss
from kdlib.points.soft_labels import SoftLabels, soft_cross_entropy
from kdlib.points.vid import Vid, gaussian_nll

__all__ = [
    "AttentionTransfer",
    "Correlation",
    "Crd",
    "Dist",
    "Dkd",
    "FitNet",
    "Fsp",
    "HardLabels",
    "HiddenCosine",
    "JensenShannon",
    "LogitMse",
    "LogitStandardised",
    "Nst",
    "Pkt",
    "Ranking",
    "Rkd",
    "SigmoidLabels",
    "SimilarityPreserving",
    "SoftLabels",
    "Vid",
    "attention_loss",
    "correlation_loss",
    "cosine_distance",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "fsp_loss",
    "gaussian_nll",
    "hard_cross_entropy",
    "hint_loss",
    "js_loss",
    "list_mle",
    "logit_mse_loss",
    "of",
    "pkt_loss",
    "rkd_loss",
    "selectivity_mmd",
    "sigmoid_cross_entropy",
    "similarity_preserving_loss",
    "soft_cross_entropy",
    "standardised_kl",
]
