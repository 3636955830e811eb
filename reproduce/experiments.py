"""
The list: what is trained, what is measured of it, what the paper claims, and what counts as holding.

All runs are of 16x16 emoji, unconditional. T is 1000 but where it says 4000: importance sampling begins once each
timestep has ten losses, which takes about 25,000 images at T = 1000 and 110,000 at 4000, and a run sees 58,000.

FD is the Fréchet distance of EfficientNet-Lite0's features to the training images. But for claims 2 and 6, on chains,
samples are drawn by dpm++2m-sde, whose noise is the schedule's, whatever variances a model has.
"""

from .declare import Claim, Counts, Experiments, Figure, Measure, Results, Row, Run, measure
from .verdicts import about_equal, clear, in_order, worst

MODEL = dict(
    image_size=16, num_channels=32, channel_mult="1,2,2", num_res_blocks=1, attention_resolutions="4",
    batch_size=32, lr=1e-3, ema_rate="0.995", log_interval=50, preview_samples=0,
)  # fmt: skip
SMALL = dict(channel_mult="1,1", attention_resolutions="8")
SMALLEST = dict(channel_mult="1", attention_resolutions="8")  # 32 channels are the fewest: GroupNorm has 32 groups

LINEAR, COSINE = dict(noise_schedule="linear"), dict(noise_schedule="cosine")
SIMPLE, HYBRID = dict(learn_sigma=False), dict(learn_sigma=True)
VLB_UNIFORM = dict(learn_sigma=True, use_kl=True)
VLB = dict(VLB_UNIFORM, schedule_sampler="loss-second-moment")

# Two standard deviations of a ratio of distances: by six sets of samples, a distance has 2.6 % with 160 samples (50
# ancestral steps; 1.6 % by dpm++2m-sde), 0.5 % with the 640 of a run
ERROR, RUN_ERROR = 0.07, 0.015


def experiments(counts: Counts) -> Experiments:
    rows = {row.label: row for row in table(counts)}
    parts = [schedules, skipping, ablation, gradients, few_steps, likelihoods, scaling, pictures]
    found = [one for part in parts for one in part(counts, rows)]
    claims, figures = ([one for one in found if isinstance(one, kind)] for kind in (Claim, Figure))
    return Experiments(claims, figures, list(rows.values()), methods(counts, rows))


# ---------------------------------------------------------------- runs


def table(counts: Counts) -> list[Row]:
    """All runs, and the two measurements that each has."""
    one, long = counts.seeds[:1], dict(diffusion_steps=counts.long)
    return [
        row(counts, "linear L_simple", LINEAR | SIMPLE),
        row(counts, "linear L_simple T=4000", LINEAR | SIMPLE | long),
        row(counts, "cosine L_simple", COSINE | SIMPLE),
        row(counts, "cosine L_hybrid", COSINE | HYBRID, followed=True),
        row(counts, "cosine L_hybrid T=4000", COSINE | HYBRID | long),
        row(counts, "cosine L_vlb", COSINE | VLB, followed=True),
        row(counts, "cosine L_vlb uniform", COSINE | VLB_UNIFORM, followed=True, seeds=one),
        row(counts, "cosine L_hybrid 320K", COSINE | HYBRID | SMALL, seeds=one),
        row(counts, "cosine L_hybrid 185K", COSINE | HYBRID | SMALLEST, seeds=one),
    ]


def row(counts: Counts, label: str, flags: dict, followed: bool = False, seeds: tuple[int, ...] = ()) -> Row:
    """:param followed: keep checkpoints on the way, not only one in the middle."""
    every = max(1, counts.steps // (counts.points if followed else 2))
    found = []
    for seed in seeds or counts.seeds:
        of_counts = dict(diffusion_steps=counts.chain, lr_anneal_steps=counts.steps, save_interval=every)
        chosen = MODEL | of_counts | flags | dict(seed=seed)
        found.append(Run(f"{label} s{seed}", tuple(sorted(chosen.items()))))
    return Row(label, found, [likelihood(counts, run) for run in found], [distance(counts, run) for run in found])


def likelihood(counts: Counts, run: Run) -> Measure:
    return measure("likelihood", run, images=counts.images, estimate=counts.estimate)


def distance(counts: Counts, run: Run, **more) -> Measure:
    settings = dict(sampler="dpm++2m-sde", evaluations=counts.evaluations, samples=counts.samples)
    return measure("distance", run, **{**settings, **more, "reference": counts.reference})


def bpd(results: Results, row: Row) -> list[float]:
    return [results[m]["bpd"] for m in row.likelihoods]


def fd(results: Results, row: Row) -> list[float]:
    return [results[m]["fd"] for m in row.distances]


def compare(number: str, claim: str, paper: str, judge, values, *rows: Row, **settings) -> Claim:
    """A claim on the NLL (values=bpd) or the FD (values=fd) of some rows, in the order claimed."""
    needs = [m for row in rows for m in (row.likelihoods if values is bpd else row.distances)]
    settings |= dict(form=".3f") if values is bpd else dict(form=".1f")
    settings |= dict(error=RUN_ERROR) if values is fd and judge is in_order else {}

    def found(results):
        return judge({row.label: values(results, row) for row in rows}, **settings)

    return Claim(number, claim, paper, needs, found)


# ---------------------------------------------------------------- 1. the schedules


def schedules(counts, rows):
    tables, run = measure("schedules"), rows["cosine L_hybrid T=4000"].runs[0]
    terms = {f"T = {t}": measure("terms", run, length=t, images=counts.terms_images) for t in counts.lengths}

    def of_variances(results):
        shares = results[tables]["share of variance ratios over 0.9"]
        found = ", ".join(f"{share:.1%} of T = {t}" for t, share in shares.items())
        return clear(f"their ratio is over 0.9 in {found}", min(shares["1000"], shares["4000"]) - 0.95)

    def of_terms(results):
        shares = {label: results[m]["share of first tenth"] for label, m in terms.items()}
        found = ", ".join(f"{label}: {share:.0%}" for label, share in shares.items())
        return clear(f"the first tenth of t has {found}", min(shares.values()) - 0.5, error=0.02)

    def of_signal(results):
        linear, cosine = (results[tables][f"{name} gone"] for name in ("linear", "cosine"))
        return clear(f"abar is below 0.01 from {linear:.0%} of T, cosine: {cosine:.0%}", cosine - linear)

    return [
        Claim("1a", "beta and the posterior's variance differ near t = 0 only", "Fig. 1", [tables], of_variances),
        Claim("1b", "The first steps carry most of the bound", "Fig. 2", list(terms.values()), of_terms),
        Claim("1c", "The linear schedule destroys information sooner", "Fig. 3, 5", [tables], of_signal),
        Figure("schedules", "The posterior's variance over beta (Fig. 1 of the paper), and abar (Fig. 5)", tables),
        Figure("noised", "Images noised by the linear schedule (above) and the cosine one, t = 0 to T (Fig. 3)",
               measure("noised")),
        Figure("terms", f"Terms of the bound of {run.name} over chains of T even timesteps (Fig. 2)", terms),
    ]  # fmt: skip


# ---------------------------------------------------------------- 2. the end of the linear schedule


def skipping(counts, rows):
    how = dict(sampler="ancestral", evaluations=counts.skip_steps, samples=counts.skip_samples, fixed="small")
    linear, cosine = (
        {skip: distance(counts, rows[label].runs[0], **how, skip=skip) for skip in counts.skips}
        for label in ("linear L_simple", "cosine L_simple")
    )

    def judge(results):
        ratios = [results[series[0.2]]["fd"] / results[series[0.0]]["fd"] for series in (linear, cosine)]
        found = "FD without the first fifth: {:.2f} times (linear), {:.2f} times (cosine)".format(*ratios)
        return clear(found, min(1.1 - ratios[0], ratios[1] - ratios[0]), ERROR)

    return [
        Claim("2", "The first fifth of the linear schedule's reverse process is of little use, unlike the cosine one's",
              "Fig. 4", [*linear.values(), *cosine.values()], judge),
        Figure("skipped", f"FD when a share of {counts.skip_steps} even steps is skipped at the noisy end (Fig. 4)",
               {"linear": linear, "cosine": cosine}),
    ]  # fmt: skip


# ---------------------------------------------------------------- 3 and 4. schedule, length, objective


def ablation(counts, rows):
    linear, long, cosine, hybrid, hybrid_long, vlb = (rows[label] for label in list(rows)[:6])
    return [
        compare("3a", "The cosine schedule has a better NLL",
                "3.77 to 3.68, CIFAR-10 3.37 to 3.26 (L_simple, T = 4000; Tables 1, 2)", in_order, bpd, cosine, linear),
        compare("3b", "and a better FD",
                "FID 31.3 to 27.0, but CIFAR-10 2.90 to 3.05 (the same)", in_order, fd, cosine, linear),
        compare("3c", "T = 4000 has a better NLL than T = 1000",
                "3.99 to 3.77, CIFAR-10 3.73 to 3.37 (linear L_simple; Tables 1, 2)", in_order, bpd, long, linear),
        compare("3d", "also with the cosine schedule and L_hybrid",
                "not in the tables", in_order, bpd, hybrid_long, hybrid),
        compare("4a", "L_hybrid has a better NLL than L_simple",
                "3.68 to 3.62, CIFAR-10 3.26 to 3.17 (cosine, T = 4000; Tables 1, 2)", in_order, bpd, hybrid, cosine),
        compare("4b", "at about the same FD (at most a tenth more)",
                "FID 27.0 to 28.0, CIFAR-10 3.05 to 3.19 (the same)", about_equal, fd, cosine, hybrid, share=0.1),
        compare("4c", "L_vlb has the best NLL",
                "3.62 to 3.57, CIFAR-10 3.17 to 2.94 (the same)", in_order, bpd, vlb, hybrid),
        compare("4d", "and a worse FD",
                "FID 28.0 to 56.7, CIFAR-10 3.19 to 11.47 (the same)", in_order, fd, hybrid, vlb),
    ]  # fmt: skip


# ---------------------------------------------------------------- 5. noise of gradients


def gradients(counts, rows):
    followed = {label: rows[label].runs[0] for label in ("cosine L_hybrid", "cosine L_vlb", "cosine L_vlb uniform")}
    run = followed["cosine L_hybrid"]
    steps = [run["save_interval"] * i for i in range(1, counts.points + 1)]

    def noise_of(run, step=steps[-1]):
        return measure("gradient_noise", run, step=step, batches=counts.batches)

    noise = {step: noise_of(run, step) for step in (steps[0], steps[-1])}
    losses = ("L_hybrid", "L_vlb importance", "L_vlb uniform")
    own = {loss: noise_of(one) for loss, one in zip(losses, followed.values(), strict=True)}
    how = dict(images=counts.curve_images, estimate=counts.curve_estimate)
    curves = {
        label: {step: measure("likelihood", one, step=step, **how) for step in steps} for label, one in followed.items()
    }

    def of_vlb(results):
        return in_order({loss: results[own[loss]][loss] for loss in (losses[0], losses[2])}, form=",.0f")

    def of_importance(results):
        return in_order({loss: results[own[loss]][loss] for loss in losses[1:]}, form=",.0f")

    def of_same(results):
        found = results[noise[steps[-1]]]
        both = [in_order({loss: found[loss], losses[2]: found[losses[2]]}, form=",.0f") for loss in losses[:2]]
        norms = ", ".join(f"{loss} {norm:.1e}" for loss, norm in found["|G|^2"].items())
        return f"{both[0][0]}; {both[1][0]}; squared norm of the expectation: {norms}", worst(v for _, v in both)

    return [
        Claim("5a", "L_vlb's gradients are noisier than L_hybrid's (noise scale in images at the weights that each "
              "trained)", "by orders of magnitude (Fig. 7)", [own[losses[0]], own[losses[2]]], of_vlb),
        Claim("5b", "and less noisy by importance sampling", "section 3.3", [own[loss] for loss in losses[1:]],
              of_importance),
        Claim("5c", f"both at the weights of {run.name}", "not in the paper", [noise[steps[-1]]], of_same),
        compare("5d", "so that L_vlb reaches a better NLL with importance sampling", "Fig. 6", in_order, bpd,
                rows["cosine L_vlb"], rows["cosine L_vlb uniform"]),
        Figure("gradients", f"Noise scale of gradients at the weights of {run.name} (crosses: at those that each loss "
               "has trained; Fig. 7), and NLL in training (Fig. 6)", {"noise": noise, "own": own, "curves": curves}),
    ]  # fmt: skip


# ---------------------------------------------------------------- 6. few steps


def few_steps(counts, rows):
    simple, hybrid = (rows[label].runs[0] for label in ("cosine L_simple", "cosine L_hybrid"))
    fifty, hundred, whole = counts.few[-3:]
    twenty = counts.few_of_solvers[-2]

    def of(run, sampler, evaluations, **more):
        how = dict(sampler=sampler, samples=counts.few_samples, **more)
        return {k: distance(counts, run, evaluations=k, **how) for k in evaluations}

    series = {
        "fixed large": of(simple, "ancestral", counts.few, fixed="large"),
        "fixed small": of(simple, "ancestral", counts.few, fixed="small"),
        "learned": of(hybrid, "ancestral", counts.few),
        "DDIM": of(hybrid, "ddim", counts.few),
        "dpm++2m-sde": of(hybrid, "dpm++2m-sde", counts.few_of_solvers),
        "unipc": of(hybrid, "unipc", counts.few_of_solvers),
    }

    def judged(number, claim, paper, judge, *labels):
        def fds(results):
            return judge(*({k: results[m]["fd"] for k, m in series[label].items()} for label in labels))

        return Claim(number, claim, paper, [m for label in labels for m in series[label].values()], fds)

    def of_learned(learned):
        found = f"FD {learned[hundred]:.1f} in {hundred} steps, {learned[whole]:.1f} in {whole}"
        return clear(found, 1.1 - learned[hundred] / learned[whole], ERROR)

    def of_fixed(learned, small, large):
        found = [values[fifty] for values in (learned, small, large)]
        text = "FD in {} steps: {:.1f}, fixed small {:.1f}, fixed large {:.1f}".format(fifty, *found)
        return clear(text, min(found[1:]) / found[0] - 1, ERROR)

    def of_ddim(learned, ddim):
        more = {k: learned[k] / ddim[k] - 1 for k in counts.few}
        found = ", ".join(f"{value:+.0%} in {k}" for k, value in more.items())
        margin = min(value if k < fifty else -value for k, value in more.items())
        return clear(f"FD of learned variances beside DDIM's: {found}", margin, ERROR)

    def of_solvers(ddim, sde, unipc):
        found = "FD in {} evaluations: dpm++2m-sde {:.1f}, unipc {:.1f}, DDIM {:.1f}"
        values = [one[twenty] for one in (sde, unipc, ddim)]
        return clear(found.format(twenty, *values), values[2] / min(values[:2]) - 1, ERROR)

    later = "later than the paper: arXiv 2211.01095, 2302.04867"
    real = measure("real", samples=counts.few_samples, reference=counts.reference)
    return [
        judged("6a", "With learned variances 100 steps are about as good as all (at most a tenth more)",
               "near-optimal FID in 100 of 4000 (Fig. 8)", of_learned, "learned"),
        judged("6b", "and better than with fixed ones in 50", "Fig. 8", of_fixed,
               "learned", "fixed small", "fixed large"),
        judged("6c", "DDIM is better below 50 steps, and not from 50 on", "Fig. 8", of_ddim, "learned", "DDIM"),
        judged("6d", "A solver is better than DDIM in 20 evaluations", later, of_solvers,
               "DDIM", "dpm++2m-sde", "unipc"),
        Figure("few_steps", f"FD of {counts.few_samples} samples by evaluations of the network (Fig. 8)",
               {"series": series, "real": real}),
    ]  # fmt: skip


# ---------------------------------------------------------------- 7. four ways to the likelihood


def methods(counts, rows):
    how = dict(images=counts.methods_images, estimate=counts.methods_estimate, even=counts.even, chosen=counts.chosen)
    return measure("methods", rows["cosine L_hybrid"].runs[0], **how, planned_images=counts.planned_images)


def likelihoods(counts, rows):
    needed = methods(counts, rows)

    def judge(results):
        whole, _, estimate, _ = results[needed]["rows"]
        error = estimate["standard error of the estimate"]
        found = f"{estimate['bpd']:.3f} ± {error:.3f}, every timestep {whole['bpd']:.3f}"
        return clear(found, 3 * error - abs(estimate["bpd"] - whole["bpd"]))

    claim = "An estimate in 100 evaluations finds the bound of all 1000 (within 3 standard errors)"
    return [Claim("7", claim, "not in the paper, which has K even timesteps and the first T/K", [needed], judge)]


# ---------------------------------------------------------------- 8. size


def scaling(counts, rows):
    labels = {"1.2M": "cosine L_hybrid", "320K": "cosine L_hybrid 320K", "185K": "cosine L_hybrid 185K"}
    sizes = {size: rows[label] for size, label in labels.items()}
    points = {}
    for size, row in sizes.items():
        run, middle = row.runs[0], row.runs[0].steps // 2
        how = dict(images=counts.images, estimate=counts.estimate)
        points[size] = {
            "size": measure("size", run),
            "images": run.steps * run["batch_size"],
            "middle": [measure("likelihood", run, step=middle, **how), distance(counts, run, step=middle)],
            "end": [row.likelihoods[0], row.distances[0]],
        }
    return [
        compare("8a", "FD falls with the size of the model",
                "FID about 4.00 + (2.5e-25 C)^-0.22 of C FLOPs (Fig. 10)", in_order, fd, *sizes.values()),
        compare("8b", "NLL falls with the size of the model",
                "about 3.40 + (3.0e-15 C)^-0.17 (Fig. 10)", in_order, bpd, *sizes.values()),
        Figure("scaling", "NLL and FD by FLOPs of training, in the middle and at the end of a run (Fig. 10)", points),
    ]  # fmt: skip


# ---------------------------------------------------------------- pictures


def pictures(counts, rows):
    run = rows["cosine L_hybrid"].runs[0]
    steps = max(k for k in (10, 20, 50) if counts.chain % k == 0)
    return [
        Figure("real", "Training images, Noto and Twemoji", measure("real_images")),
        Figure("samples", f"Samples of {run.name} in 20 evaluations, dpm++2m-sde",
               measure("sample_images", run, evaluations=20)),
        Figure("interpolation", f"Between two held-out images (left, right): their DDIM inversions by {run.name}, "
               "interpolated and decoded", measure("interpolation", run, evaluations=steps)),
    ]  # fmt: skip
