"""Every registered policy keeps the contract of `Policy` and `PolicyActor`."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import latentact
from latentact.agents.own import PolicyActor
from latentact.data.samples import PolicyBatch, PolicySamples, count_words, vocabulary
from latentact.data.store import FrameStore
from latentact.errors import UserError
from latentact.policies.bc import BcConfig
from latentact.policies.conformance import check_policy, random_batch
from latentact.policies.contract import POLICIES, Policy
from latentact.policies.decoder import ActionDecoder, DecoderConfig
from latentact.policies.guided import GuidedConfig
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig, NetworkPolicy
from latentact.policies.spec import PolicySpec, Target
from latentact.types import ActionSpace, LatentActionSpec

DISCRETE, CONTINUOUS = ActionSpace(kind="discrete", size=4), ActionSpace(kind="continuous", size=2)
NETWORK = NetworkConfig(
    backbone="patch", patch=8, channels=(8,), n_obs_steps=2, chunk_size=3, n_action_steps=2, use_state=True
)
WORDS = ("blue", "red")
SPEC = PolicySpec(
    resolution=32, state_size=3, words=WORDS, target=Target(kind="continuous", size=6), stride=3
)
LATENT = LatentActionSpec(
    model="lapo",
    tokens=2,
    token_dim=3,
    codebook_size=5,
    frame_gap=3,
    frame_gap_s=0.3,
    fps=10.0,
    resolution=32,
    camera="",
    weights="1234",
)
CODES = Target(kind="classes", size=5, num_tokens=2)


def latent(network=NETWORK, target="continuous", spec=SPEC):
    config = LatentConfig(network=network, target=target)
    return config.build(replace(spec, target=config.targets(LATENT, None).target), LATENT)


def bc(network=NETWORK, space=DISCRETE):
    target = Target(kind="classes" if space.discrete else "continuous", size=space.size)
    return BcConfig(network=network).build(replace(SPEC, target=target, action_space=space, stride=1))


def guided(space=CONTINUOUS, linear=False):
    config = GuidedConfig(network=NETWORK, offsets=(0, 2), dropout=0.0, linear=linear)
    target = Target(kind="classes" if space.discrete else "continuous", size=space.size)
    guide = config.targets(LATENT, space).guide
    return config.build(replace(SPEC, target=target, action_space=space, stride=1, guide=guide), LATENT)


MAKERS = {
    "bc discrete": lambda: bc(),
    "bc continuous": lambda: bc(space=CONTINUOUS),
    "bc impala": lambda: bc(replace(NETWORK, backbone="impala", impala_scale=1)),
    "bc keypoints": lambda: bc(replace(NETWORK, patch=4, channels=(8, 8), halve=True, keypoints=4)),
    "bc state": lambda: bc(replace(NETWORK, backbone="state")),
    "latent vectors": lambda: latent(),
    "latent codes": lambda: latent(target="codes"),
    "latent grounded": lambda: latent().ground(DecoderConfig(hidden=(8,), use_state=True), DISCRETE),
    "guided": lambda: guided(),
    "guided discrete": lambda: guided(DISCRETE),
    "guided linear": lambda: guided(linear=True),
    "latent codes grounded": lambda: latent(target="codes").ground(DecoderConfig(hidden=()), CONTINUOUS),
}


observe = random_batch


def out(policy, batch):
    return policy(batch.frames, batch.state, batch.words, batch.guide)


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def policy(request):
    torch.manual_seed(0)
    made = request.param()
    for name, values in made.named_buffers():  # statistics that are not their defaults
        values.copy_(torch.rand_like(values) + 0.5 if "std" in name else torch.rand_like(values))
    return made


def test_every_policy_is_here():
    assert {make().config.kind for make in MAKERS.values()} == set(POLICIES.names())


def test_every_policy_passes_the_public_check(policy):
    before = {key: value.clone() for key, value in policy.state_dict().items()}
    assert latentact.check_policy is check_policy
    check_policy(policy)
    after = policy.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_linear_map_of_a_guide_is_fitted_before_training():
    """Actions that are linear in tokens and state are nearly exact; hidden guides do not disturb the fit."""
    torch.manual_seed(0)
    made, batch = guided(linear=True), observe(guided(), 64)
    exact = torch.cat([batch.guide.flatten(1), batch.state], dim=1) @ torch.randn(15, 6) + 1
    batch = replace(batch, target=exact.view(64, 3, 2), mask=torch.ones(64, 3, dtype=torch.bool))
    made.set_action_stats(batch.target[:, 0].numpy(), batch.state.numpy(), batch.guide[:, 0].numpy())
    before = made.loss(batch)[0].item()
    hidden = batch.guide.clone()
    hidden[::4] = torch.nan
    made.initialize(replace(batch, guide=hidden))
    assert made.loss(batch)[0].item() < 1e-2 < before
    with pytest.raises(UserError, match=r"policy\.linear must be false for discrete actions, got true"):
        guided(DISCRETE, linear=True)


class SharedAcrossBatch(NetworkPolicy):
    def features(self, frames, state, words):
        features = super().features(frames, state, words)
        return features - features.mean(0)


class RandomInEvaluation(NetworkPolicy):
    def forward(self, frames, state, words, guide=None):
        return super().forward(frames, state, words, guide) + torch.randn(())


class OneStepTooFew(NetworkPolicy):
    def forward(self, frames, state, words, guide=None):
        return super().forward(frames, state, words, guide)[:, 1:]


class MaskedTargetsCount(NetworkPolicy):
    def loss(self, batch):
        return super().loss(replace(batch, mask=torch.ones_like(batch.mask)))


class UnusedLayer(NetworkPolicy):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.unused = torch.nn.Linear(3, 3)


class StateOutsideTheCheckpoint(NetworkPolicy):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.offset = torch.rand(())

    def forward_with_features(self, frames, state, words, guide=None):
        out, features = super().forward_with_features(frames, state, words, guide)
        return out + self.offset, features


class StateOptional(NetworkPolicy):
    def normal_state(self, state):
        return torch.zeros(4, 3) if state is None else super().normal_state(state)


class GuideIgnored(NetworkPolicy):
    def normal_guide(self, guide, batch_size):
        return super().normal_guide(None, batch_size) + 0 * sum(p.sum() for p in self.guide.parameters())


class NanGuideIsZero(NetworkPolicy):
    def normal_guide(self, guide, batch_size):
        return super().normal_guide(None if guide is None else guide.nan_to_num(), batch_size)


class OtherFeatures(NetworkPolicy):
    def forward_with_features(self, frames, state, words, guide=None):
        out, features = super().forward_with_features(frames, state, words, guide)
        return out, 2 * features


class NotTheOutputLayer(NetworkPolicy):
    @property
    def output_layer(self):
        return self.guide[2]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SharedAcrossBatch, "must treat the samples of a batch independently"),
        (RandomInEvaluation, "must be deterministic in evaluation mode"),
        (OneStepTooFew, r"forward must return float32 \[4, 3, 2\], got float32 \[4, 2, 2\]"),
        (MaskedTargetsCount, "loss must ignore masked targets"),
        (UnusedLayer, "no gradient for unused.weight, unused.bias"),
        (StateOutsideTheCheckpoint, "a saved policy must load bit-equal"),
        (StateOptional, "must reject a missing state"),
        (GuideIgnored, "must depend on the guide"),
        (NanGuideIsZero, "must treat a guide of NaN as no guide"),
        (OtherFeatures, "forward_with_features must return the results of forward and features"),
        (NotTheOutputLayer, "output_layer must be the layer that forward ends with"),
    ],
)
def test_the_public_check_finds_planted_faults(fault, message, monkeypatch):
    sound = guided()
    network = sound.config.network
    monkeypatch.setattr(
        GuidedConfig, "build", lambda config, spec, latent=None: fault(config, network, spec, latent)
    )
    faulty = sound.config.build(sound.spec, sound.latent)
    with pytest.raises(UserError, match=message):
        check_policy(faulty)


def test_checkpoints_with_former_names_load(policy, tmp_path):
    """A config.json as it was written before targets and networks got their present names."""
    policy.save_pretrained(tmp_path / "policy")
    path = tmp_path / "policy/config.json"
    values = json.loads(path.read_text())
    network, target = values["policy"]["network"], values["spec"]["target"]
    for old, new in (("frames", "n_obs_steps"), ("chunk", "chunk_size"), ("execute", "n_action_steps")):
        network[old] = network.pop(new)
    target["groups"] = target.pop("num_tokens")
    target["kind"] = {"continuous": "numbers"}.get(target["kind"], target["kind"])
    path.write_text(json.dumps(values))
    found = Policy.from_pretrained(tmp_path / "policy")
    assert (found.config, found.spec) == (policy.config, policy.spec)
    assert torch.equal(found.action_scores(observe(policy)), policy.eval().action_scores(observe(policy)))


def test_saved_and_loaded_it_is_the_same(policy, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    found = Policy.from_pretrained(tmp_path / "policy")
    assert (found.config, found.spec, found.latent) == (policy.config, policy.spec, policy.latent)
    mine, other = policy.state_dict(), found.state_dict()
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert not found.training
    batch = observe(policy)
    assert torch.equal(found.action_scores(batch), policy.eval().action_scores(batch))
    names = {path.name for path in (tmp_path / "policy").iterdir()}
    files = {"config.json", "model.safetensors"} | ({"spec.json"} if policy.latent else set())
    if policy.spec.action_space is not None:
        files |= {"policy_preprocessor.json", "policy_postprocessor.json"}
    assert names == files


def test_loss_is_finite_and_reaches_every_weight(policy):
    loss, _ = policy.loss(observe(policy))
    assert torch.isfinite(loss)
    loss.backward()
    missing = {
        name for name, weight in policy.named_parameters() if weight.grad is None or not weight.grad.any()
    }
    assert {name for name in missing if not name.startswith("decoder.")} == set()


def test_masked_targets_count_nothing(policy):
    batch = observe(policy)
    mask = batch.mask.clone()
    mask[0, 1:] = mask[2] = False
    wrong = batch.target.clone()
    wrong[~mask] = 0 if policy.spec.target.kind == "classes" else float("nan")
    losses = [policy.loss(replace(batch, mask=mask, target=target))[0] for target in (batch.target, wrong)]
    assert torch.equal(*losses)
    assert losses[0] != policy.loss(batch)[0]


def test_order_of_a_batch_does_not_matter(policy):
    batch, order = observe(policy), torch.tensor([2, 0, 3, 1])
    present = {key: values for key, values in vars(batch).items() if values is not None}
    moved = PolicyBatch(**present | {key: values[order] for key, values in present.items()})
    assert torch.allclose(out(policy.eval(), batch)[order], out(policy, moved), atol=1e-5)


def test_it_learns_four_samples(policy):
    batch = observe(policy)
    optimizer = torch.optim.Adam(policy.parameters(), 3e-3)
    first = policy.loss(batch)[0].item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = policy.loss(batch)[0]
        loss.backward()
        optimizer.step()
        if loss.item() < 0.05 * first:
            return
    pytest.fail(f"the loss fell from {first:.3g} to {loss.item():.3g} only")


def test_every_observation_matters(policy):
    """Older frame, state and task words all change what comes out; frames not of a policy on the state."""
    batch = observe(policy)
    before = out(policy.eval(), batch)
    older = batch.frames.clone()
    older[:, 0] = 255 - older[:, 0]
    for changed in ({"frames": older}, {"state": batch.state + 1}, {"words": 1 - batch.words}):
        other = out(policy, replace(batch, **changed))
        ignored = "frames" in changed and not policy.uses_frames
        assert torch.allclose(other, before, atol=1e-6) == ignored


def test_a_wrong_state_is_refused(policy):
    batch = observe(policy)
    for state, got in ((None, "none"), (batch.state[:, :2], "2")):
        with pytest.raises(UserError, match=f"must have 3 values, got {got}"):
            policy(batch.frames, state, batch.words)


def test_actions_have_the_shape_of_the_space(policy):
    batch, space, chunk = observe(policy), policy.spec.action_space, policy.config.network.chunk_size
    if space is None:
        with pytest.raises(UserError, match="Ground it first"):
            policy.actions(batch)
        return
    actions = policy.eval().actions(batch)
    steps = chunk * policy.spec.stride
    assert actions.shape == ((4, steps) if space.discrete else (4, steps, space.size))
    assert actions.dtype == (np.int64 if space.discrete else np.float32)


class Spied(PolicyActor):
    """Records what the policy is asked."""

    def __init__(self, policy):
        super().__init__(policy)
        self.asked, actions = [], policy.actions

        def spy(batch, *choose):
            self.asked.append(batch)
            return actions(batch, *choose)

        policy.actions = spy


def play(actor, steps, seed=0, b=2):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(256, size=(steps, b, 32, 32, 3), dtype=np.uint8)
    state = rng.normal(size=(steps, b, 3)).astype(np.float32)
    tasks = ["the RED ball", "the blue blue ball"][:b]
    return pixels, [actor.act(pixels[i], state[i], tasks) for i in range(steps)]


def test_actor_executes_its_chunk_and_looks_again(policy):
    if policy.spec.action_space is None:
        return
    actor, stride = Spied(policy), policy.spec.stride
    actor.reset(2)
    executed = policy.config.network.n_action_steps * stride
    pixels, done = play(actor, 2 * executed + 1)
    assert len(actor.asked) == 3
    plans = [policy.eval().actions(batch) for batch in actor.asked[:3]]
    for i, action in enumerate(done):
        assert np.array_equal(action, plans[i // executed][:, i % executed])
    # Two observed frames, `stride` environment steps apart; before the start the first frame is repeated.
    seen = [batch.frames.permute(0, 1, 3, 4, 2).numpy() for batch in actor.asked]
    assert np.array_equal(seen[0], np.stack([pixels[0], pixels[0]], 1))
    assert np.array_equal(seen[1], np.stack([pixels[executed - stride], pixels[executed]], 1))
    assert actor.asked[0].words.tolist() == [[0, 1], [2, 0]]


def test_reset_clears_the_state(policy):
    if policy.spec.action_space is None:
        return
    actor = PolicyActor(policy)
    actor.reset(2)
    _, first = play(actor, 5)
    actor.reset(2)
    _, again = play(actor, 5)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    actor.reset(1)
    play(actor, 3, b=1)


def test_a_mixture_weighs_what_codes_lead_to():
    space = ActionSpace(kind="discrete", size=2)
    decoder = ActionDecoder(DecoderConfig(hidden=(), mixture=True), 1, 0, space, 1, codes=3)
    vectors = np.array([[1.0], [-1.0], [0.0]], np.float32)
    decoder.set_codebook(np.array([0, 1, 2]), vectors)
    assert decoder.codebook[:, 0].tolist() == pytest.approx([1.5**0.5, -(1.5**0.5), 0])
    with torch.no_grad():  # p(action 1 | code) = 3/4, 1/4, 1/2
        decoder.net[0].weight.copy_(torch.tensor([[0.0], [np.log(3) / 1.5**0.5]]))
        decoder.net[0].bias.zero_()
    codes = torch.tensor([[[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]])
    likely = decoder.mix(codes, None).exp()
    assert likely[0, :, 1].tolist() == pytest.approx([0.625, 0.25])
    assert likely.sum(-1).flatten().tolist() == pytest.approx([1, 1])


def test_a_mixture_needs_one_code_and_discrete_actions():
    one = replace(LATENT, tokens=1)
    config = LatentConfig(network=replace(NETWORK, use_state=False), target="codes")
    spec = replace(SPEC, target=config.targets(one, None).target)
    grounded = config.build(spec, one).ground(DecoderConfig(mixture=True, use_state=True), DISCRETE)
    assert grounded.decoder.codebook.shape == (5, 3)
    check_policy(grounded)
    with pytest.raises(UserError, match=r"needs one code per step .*, got 1 x classes and continuous"):
        config.build(spec, one).ground(DecoderConfig(mixture=True), CONTINUOUS)
    with pytest.raises(UserError, match=r"decoder.mixture needs one code per step .*, got 2 x classes"):
        latent(target="codes").ground(DecoderConfig(mixture=True), DISCRETE)


@pytest.mark.parametrize("space", [DISCRETE, CONTINUOUS], ids=["discrete", "continuous"])
@pytest.mark.parametrize("steps", [1, 3])
def test_decoder_learns_the_actions_of_each_step(space, steps):
    """Latent [x] means actions f(x), f(x)+1, ... in the environment steps of its gap."""
    torch.manual_seed(0)
    decoder = ActionDecoder(DecoderConfig(hidden=(32,)), 2, 0, space, steps)
    latents = torch.randn(64, 2, 2)
    ahead = torch.arange(steps)
    if space.discrete:
        actions = ((latents[..., :1] > 0).long() + ahead).flatten(1)
    else:
        actions = (latents[..., None, :] * 30 + 100 + ahead[:, None]).flatten(1, 2)
        decoder.set_action_stats(actions.flatten(0, 1).numpy())
        assert torch.allclose(decoder.mean, actions.flatten(0, 1).mean(0), rtol=1e-4)
    mask = torch.ones(64, 2 * steps, dtype=torch.bool)
    optimizer = torch.optim.Adam(decoder.parameters(), 0.01)
    for _ in range(300):
        optimizer.zero_grad()
        decoder.action_loss(decoder(latents, None), actions, mask).backward()
        optimizer.step()
    out = decoder(latents, None)
    assert out.shape == (64, 2 * steps, space.size)
    if space.discrete:
        assert (out.argmax(-1) == actions).float().mean() > 0.95
    else:
        assert (decoder.unnormalize(out) - actions).abs().mean() < 3
    # Hidden actions count nothing.
    hidden = actions.clone()
    mask[:, 0], hidden[:, 0] = False, -1 if space.discrete else float("nan")
    assert torch.equal(decoder.action_loss(out, hidden, mask), decoder.action_loss(out, actions, mask))


def test_grounding_keeps_the_network_and_what_it_means():
    policy = latent()
    grounded = policy.ground(DecoderConfig(hidden=(8,)), CONTINUOUS)
    assert grounded.latent == LATENT
    assert grounded.spec == replace(policy.spec, action_space=CONTINUOUS)
    batch = observe(policy)
    assert torch.equal(
        policy(batch.frames, batch.state, batch.words), grounded(batch.frames, batch.state, batch.words)
    )


def test_codes_need_a_codebook():
    with pytest.raises(UserError, match=r"for labels of lapo, which have no codes, got codes"):
        LatentConfig(target="codes").targets(replace(LATENT, codebook_size=None), None)


@pytest.mark.parametrize("wrong", [{"backbone": "vit"}, {"n_action_steps": 4}, {"n_action_steps": 0}])
def test_networks_that_cannot_be_built(wrong):
    with pytest.raises(UserError, match=f"network.{next(iter(wrong))}"):
        replace(NETWORK, **wrong)


class Store(FrameStore):
    """Three episodes of 4, 3 and 5 rows whose frames say their row."""

    def __init__(self) -> None:
        """Everything is in the class."""

    lengths = np.array([4, 3, 5])
    starts = np.array([0, 4, 7])
    episode = np.repeat([0, 1, 2], lengths)
    task_texts = ("go to the red ball", "go to the blue ball", "go to the red box")
    task, usable = episode, np.ones(12, bool)
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    state = np.arange(24, dtype=np.float32).reshape(12, 2)


def test_samples_never_leave_their_episode():
    exists = np.ones(12, bool)
    exists[[3, 6, 11]] = exists[8] = False
    target = np.arange(12)[:, None]
    words = vocabulary(Store.task_texts)
    assert words == ("ball", "blue", "box", "red")
    with_all = {"frames": 2, "chunk": 3, "stride": 2, "words": words}
    samples = PolicySamples(Store(), target=target, exists=exists, **with_all)
    assert samples.rows.tolist() == [0, 1, 2, 4, 5, 7, 9, 10]
    batch = samples.__getitems__([0, 1, 3, 5, 7])  # rows 0, 1, 4, 7, 10
    assert batch.frames[:, :, 0, 0, 0].tolist() == [[0, 0], [0, 1], [4, 4], [7, 7], [8, 10]]
    assert batch.mask.tolist() == [
        [True, True, False],  # 0, 2; 4 is another episode's
        [True, False, False],  # 1; 3 has no target, 5 is another episode's
        [True, False, False],  # 4; 6 has no target
        [True, True, False],  # 7, 9; 11 has no target
        [True, False, False],
    ]
    kept = [row[keep].tolist() for row, keep in zip(batch.target[..., 0], batch.mask, strict=True)]
    assert kept == [[0, 2], [1], [4], [7, 9], [10]]
    assert batch.state is not None
    assert batch.state[:, 0].tolist() == [0, 2, 8, 14, 20]
    assert batch.words.tolist() == [[1, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_a_guide_is_what_comes_before_and_after_within_its_episode():
    exists = np.ones(12, bool)
    exists[[3, 5, 6, 10, 11]] = False
    there = exists.copy()
    there[4] = False  # the second episode has no token at all
    there[7] = False  # the third one's first row has none
    tokens = np.arange(12, dtype=np.float32)[:, None]
    shape = {"target": np.zeros((12, 1)), "guide": (tokens, there), "offsets": (-1, 0, 2)}
    samples = PolicySamples(Store(), exists=exists, **shape)
    assert samples.rows.tolist() == [0, 1, 2, 4, 7, 8, 9]
    guide = samples.batch(samples.rows).guide[..., 0].numpy()
    nan = float("nan")
    expected = [[0, 0, 2], [0, 1, 2], [1, 2, 2], [nan] * 3, [8, 8, 9], [8, 8, 9], [8, 9, 9]]
    assert np.array_equal(guide, expected, equal_nan=True)


def test_a_guide_without_the_present_is_refused():
    for offsets in ((-3, -1), ()):
        with pytest.raises(UserError, match=r"policy\.offsets must have an offset of at least 0, got \["):
            GuidedConfig(offsets=offsets)


def test_a_guide_that_is_hidden_is_none():
    policy = guided().eval()
    batch = observe(policy)
    hidden = torch.full_like(batch.guide, float("nan"))
    assert torch.equal(out(policy, replace(batch, guide=hidden)), out(policy, replace(batch, guide=None)))
    assert not torch.allclose(out(policy, batch), out(policy, replace(batch, guide=None)))
    half = batch.guide.clone()
    half[0, 1, 3] = float("nan")  # one number that is missing hides the whole guide of that row
    mixed = out(policy, replace(batch, guide=half))
    assert torch.equal(mixed[0], out(policy, replace(batch, guide=None))[0])
    assert torch.equal(mixed[1:], out(policy, batch)[1:])


def test_dropout_hides_guides_in_training_only():
    policy = guided()
    policy.spec = replace(policy.spec, guide=replace(policy.spec.guide, dropout=0.5))
    batch = observe(policy, 64)
    torch.manual_seed(0)
    with_guide, without = out(policy.eval(), batch), out(policy, replace(batch, guide=None))
    trained = out(policy.train(), batch)
    shown = [torch.allclose(trained[i], with_guide[i], atol=1e-6) for i in range(64)]
    dropped = [torch.allclose(trained[i], without[i], atol=1e-6) for i in range(64)]
    assert sum(shown) + sum(dropped) == 64
    assert 16 < sum(dropped) < 48


def test_words():
    assert vocabulary(("go", "go")) == ()
    assert vocabulary(()) == ()
    assert count_words("Red red green", ("blue", "red")) == [0.0, 2.0]
    with pytest.raises(UserError, match="must have a step with a target"):
        PolicySamples(Store(), target=np.zeros((12, 1)), exists=np.zeros(12, bool))
