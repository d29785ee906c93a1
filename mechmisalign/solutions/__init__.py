"""Why a model becomes generally rather than narrowly misaligned: two solutions of one task, measured (2602.07852).

A solution is what training found: an adapter, or a learned steering vector. The same narrow data can be learned by a
general solution, which is harmful everywhere, and, under a KL penalty on other matters, by a narrow one.

========================  ============================================================================================
efficiency                :func:`efficiency`: loss on the training data against the norm
stability                 :func:`stability`: what noise of the solution's own size takes away
significance              :func:`significance`: KL on neutral text against the norm, beside random solutions
behaviour                 :func:`answers`, then :func:`skills` (narrow skill against misalignment) and
                          :func:`hidden_em` (scaled up); :func:`kl_to_chat`
training                  :func:`kl_sweep`, :func:`joint_path`
========================  ============================================================================================
"""

from .behaviour import MULTIPLIERS, NARROW, answers, hidden_em, kl_to_chat, skills
from .efficiency import Efficiency, efficiency
from .forms import Solution, SolutionError, mean_norm, norm, norms_by_site, random_like, worn
from .neutral import Significance, significance
from .noise import Noise, balanced, perturbed, turned
from .paths import JointPath, joint_path, kl_sweep
from .stability import Stability, stability

__all__ = [
    "MULTIPLIERS",
    "NARROW",
    "Efficiency",
    "JointPath",
    "Noise",
    "Significance",
    "Solution",
    "SolutionError",
    "Stability",
    "answers",
    "balanced",
    "efficiency",
    "hidden_em",
    "joint_path",
    "kl_sweep",
    "kl_to_chat",
    "mean_norm",
    "norm",
    "norms_by_site",
    "perturbed",
    "random_like",
    "significance",
    "skills",
    "stability",
    "turned",
    "worn",
]
