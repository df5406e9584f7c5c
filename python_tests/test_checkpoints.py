"""State dicts of quantized models: the quantizer travels with them, and what does not fit is refused."""

import copy
import io
import json
import pickle
import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.savable import (
    IDENTITY,
    LAYERS,
    Tied,
    assert_equal,
    conv1d,
    group_max,
    layer_of,
    mlp,
    quantized,
    quantizer,
    row_max,
    row_mean,
    state_of,
)
from support.training import batch, loss_of, make
from torch import nn

import fogzo_kernels as fk


def extra(found):
    return torch.frombuffer(bytearray(json.dumps(found).encode()), dtype=torch.uint8)


# ---- the state of a quantized model


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_quantizer_travels_as_json(layer):
    make_layer, x = layer_of(layer)
    model = quantized(nn.Sequential(make_layer()))
    state = saved(model.state_dict())
    assert set(state) == {*make_plain_keys(make_layer), "0.alpha", "0._extra_state"}
    found = state["0._extra_state"]
    assert found.dtype == torch.uint8
    assert json.loads(bytes(found.tolist())) == model[0].quantizer.to_dict() | {"activation": None}
    for assign in (False, True):
        other = quantized(nn.Sequential(make_layer()))
        assert not torch.equal(other(x), model(x))
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), model(x))
        assert_equal(other.state_dict(), model.state_dict())
        assert other[0].in_rows(other[0].weight)
        assert isinstance(other[0].weight, nn.Parameter)


def make_plain_keys(make_layer):
    return nn.Sequential(make_layer()).state_dict()


def test_a_state_loads_into_a_model_from_the_meta_device():
    model = quantized(mlp())
    with torch.device("meta"):
        other = quantized(mlp())
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(other(torch.ones(2, 8)), model(torch.ones(2, 8)))
    with torch.device("meta"):
        other = quantized(mlp())
    other.to_empty(device="cpu")
    assert other[0].alpha.isnan().all()  # not memory that looks like one
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(torch.ones(2, 8)), model(torch.ones(2, 8)))


def test_a_pickled_model_takes_the_same_step():
    model, _ = make()
    loaded = pickle.loads(pickle.dumps(model))
    assert_equal(loaded.state_dict(), model.state_dict())
    assert loaded.tied.weight is loaded.second.weight
    steps = []
    for one in (model, loaded):
        torch.manual_seed(1)
        fogzo = fk.Fogzo(one, total_steps=10, one_minus_beta=0.01, directions=1)
        steps.append(
            {
                "loss": fogzo.backward(lambda one=one: loss_of(one, *batch())),
                **{name: p.grad for name, p in one.named_parameters()},
            }
        )
    assert_equal(*steps)


def test_a_step_of_fogzo_after_loading_is_that_before_saving():
    model, fogzo = make()
    state = saved({"model": model.state_dict(), "fogzo": fogzo.state_dict()})
    other, resumed = make(seed=5)
    other.load_state_dict(state["model"])
    resumed.load_state_dict(state["fogzo"])
    for one, estimator in ((model, fogzo), (other, resumed)):
        torch.manual_seed(1)
        estimator.backward(lambda one=one: loss_of(one, *batch()))
    assert_equal(*({name: p.grad for name, p in one.named_parameters()} for one in (other, model)))


def test_a_distributed_checkpoint_loads_without_a_process_group(tmp_path):
    model, other = quantized(Tied()), quantized(Tied(seed=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no process group
        dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path)
        state = {"model": other.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path)
        finer = {"model": quantized(Tied(), bits=4).state_dict()}
        dcp.load(finer, checkpoint_id=tmp_path)
    other.load_state_dict(state["model"])
    assert_equal(other.state_dict(), model.state_dict())
    with pytest.raises(RuntimeError, match="body: the quantizer must have Grid"):
        quantized(Tied(), bits=4).load_state_dict(finer["model"])


# ---- safetensors


@pytest.mark.parametrize("make_model", [Tied, lambda seed=0: nn.ModuleList([conv1d()])], ids=["tied", "Conv1D"])
def test_safetensors_keep_a_model_with_tied_and_transposed_weights(make_model, tmp_path):
    """Tied weights are saved once, and those whose memory is transposed."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = quantized(make_model()), quantized(make_model(seed=1))
    safetensors.save_model(model, tmp_path / "model")
    assert safetensors.load_model(other, tmp_path / "model") == (set(), [])
    assert_equal(other.state_dict(), model.state_dict())


def test_safetensors_keep_a_state_dict(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, other = quantized(mlp()), quantized(mlp(seed=1))
    safetensors.save_file(model.state_dict(), tmp_path / "model")
    other.load_state_dict(safetensors.load_file(tmp_path / "model"))
    assert_equal(other.state_dict(), model.state_dict())


# ---- what is refused


def put(key, value):
    return lambda state: state.update({key: value(state[key])})


WITHOUT_GRID = {k: v for k, v in quantizer().to_dict().items() if k != "grid"}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("2._extra_state", lambda s: extra(quantizer(4).to_dict())),
         "2: the quantizer must have Grid(qmin=-2, qmax=1, offset=0.0, r=1), got a state with Grid(qmin=-8,"),
        (put("2.alpha", lambda a: a.bfloat16()),
         "2: alpha must be float32, got bfloat16: was the state dict cast?"),
        (put("2.alpha", lambda a: a[0]), "2: alpha must have shape (4, 1), got (1,)"),
        (put("2.alpha", lambda a: 0.5), "2: alpha must be a tensor, got float"),
        (put("2._extra_state", lambda s: None), "2: the quantizer's state must be a uint8 tensor, got None"),
        (put("2._extra_state", lambda s: s.int()), "2: the quantizer's state must be a uint8 tensor, got int"),
        (put("2._extra_state", lambda s: s[:9]), "2: the quantizer's state must be JSON, got b'"),
        (put("2._extra_state", lambda s: s[:0]), "2: the quantizer's state must be JSON, got b''"),
        (put("2._extra_state", lambda s: s + 128), "2: the quantizer's state must be JSON, got b'"),
        (put("2._extra_state", lambda s: extra([])), "2: the quantizer must be of version 1, got list"),
        (put("2._extra_state", lambda s: extra(WITHOUT_GRID)), "2: the quantizer must be as to_dict gives it"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_that_does_not_fit_is_named_and_changes_nothing(edit, message, strict):
    """Named by module; that module stays as it was, and what else is wrong is in the same exception."""
    model, state = quantized(mlp()), quantized(mlp(seed=1)).state_dict()
    edit(state)
    state["0.bias"] = torch.zeros(3)
    before = {k: v for k, v in state_of(model).items() if k.startswith("2.")}
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        model.load_state_dict(state, strict=strict)
    assert "size mismatch for 0.bias" in str(caught.value)
    assert_equal({k: v for k, v in state_of(model).items() if k.startswith("2.")}, before)


def test_a_module_that_is_the_model_is_named():
    model = quantized(nn.Linear(8, 4))
    with pytest.raises(RuntimeError, match=r"\tmodel: the quantizer must have Grid\(qmin=-2"):
        model.load_state_dict(quantized(nn.Linear(8, 4), bits=4).state_dict())


def test_half_a_state_is_refused():
    """A checkpoint of a quantized model that lost one of the two is no plain one."""
    for key in ("2.alpha", "2._extra_state"):
        model, state = quantized(mlp()), quantized(mlp(seed=1)).state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key\\(s\\) in state_dict: "{key}"'):
            model.load_state_dict(state)
        assert model.load_state_dict(state, strict=False).missing_keys == [key]


def test_another_straight_through_kind_warns():
    state = quantized(mlp(), straight_through=fk.StraightThrough("identity", clip=False)).state_dict()
    model = quantized(mlp())
    with pytest.warns(UserWarning, match=r"training goes on with .*clip=True.* was trained with .*clip=False"):
        model.load_state_dict(state)
    assert model[0].quantizer.straight_through == IDENTITY


def test_a_plain_model_refuses_the_state_of_a_quantized_one():
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0._extra_state", "0.alpha"'):
        mlp().load_state_dict(quantized(mlp()).state_dict())


# ---- a checkpoint of the plain model


@pytest.mark.parametrize("alpha", [row_max, group_max, lambda w: w.abs().max() / 7])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_plain_weights_get_new_alphas(layer, assign, alpha):
    make_layer, x = layer_of(layer)
    plain, model = nn.Sequential(make_layer()), quantized(nn.Sequential(make_layer()), bits=4, alpha=alpha)
    with torch.no_grad():
        plain[0].weight *= 5
    stale = model[0].alpha.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.load_state_dict(saved(plain.state_dict()), assign=assign) == ([], [])
    w, q = plain[0].weight, model[0].effective_weight()
    expected = quantized(copy.deepcopy(plain), bits=4, alpha=alpha)
    assert_equal(model.state_dict(), expected.state_dict())
    assert torch.equal(model(x), expected(x))
    assert model[0].in_rows(model[0].weight)
    with torch.no_grad():
        error = (q - w).norm() / w.norm()
        model[0].alpha = stale
        assert error < 0.2 < (model[0].effective_weight() - w).norm() / w.norm()


def test_plain_weights_of_another_dtype_are_rounded_before_alphas_are_made():
    """The alphas are made from the weights as they are then, rounded."""
    model, plain = quantized(mlp()).bfloat16(), mlp(seed=1)
    model.load_state_dict(plain.state_dict())
    assert_equal(model.state_dict(), quantized(mlp(seed=1).bfloat16()).state_dict())


def test_fixed_alphas_stay_and_one_warning_says_so():
    model, plain = quantized(mlp(), alpha=0.3), mlp(seed=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.load_state_dict(plain.state_dict())
    assert [str(w.message)[:64] for w in caught] == [
        "the loaded weights come from a model that was not quantized, and"
    ]
    assert [model[i].alpha.item() for i in (0, 2)] == [torch.tensor(0.3).item()] * 2
    assert torch.equal(model[0].weight, plain[0].weight)


def test_alphas_stay_where_a_plain_state_lacks_the_weight():
    """Alphas stay where no weight came."""
    model, state = quantized(mlp()), mlp(seed=1).state_dict()
    before = model[2].alpha.clone()
    with torch.no_grad():
        model[2].weight *= 2  # from which alpha would be another one
    weight = state.pop("2.weight")
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "2.weight"\. $'):
        model.load_state_dict(state)
    state["other"] = torch.ones(1)
    found = model.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == (["2.weight"], ["other"])
    assert torch.equal(model[2].alpha, before)
    assert torch.equal(model[0].alpha, row_mean(model[0].weight))
    with pytest.raises(RuntimeError, match=r"size mismatch for 2\.weight"):
        model.load_state_dict({"2.weight": weight[:2]}, strict=False)
    assert torch.equal(model[2].alpha, before)


def test_a_scale_that_cannot_make_alphas_anew_is_an_error():
    model = pickle.loads(pickle.dumps(quantized(mlp(), alpha=lambda w: w.abs().mean())))
    with pytest.raises(RuntimeError, match=r"\t0: alpha must be given anew: it was a function") as caught:
        model.load_state_dict(mlp(seed=1).state_dict())
    assert "\t2: alpha must be given anew" in str(caught.value)
    zeros = {k: torch.zeros_like(v) for k, v in mlp().state_dict().items()}
    with pytest.raises(RuntimeError, match=r"\t0: alpha must be finite, > 0"):
        quantized(mlp()).load_state_dict(zeros)


def test_alphas_stay_where_the_scale_was_a_tensor():
    """As a model has it whose quantizers came from a config: the alphas are there, the scale is not."""
    model, plain = quantized(mlp(), alpha=torch.tensor([0.3])), mlp(seed=1)
    for m in (model[0], model[2]):
        saved_as = m.quantizer.to_dict()
        m.quantizer = fk.Quantizer.from_dict(json.loads(json.dumps(saved_as)))
        assert m.quantizer.to_dict() == saved_as
    with pytest.warns(UserWarning, match="was not quantized, and the fixed alpha stays as it was"):
        model.load_state_dict(plain.state_dict())
    assert model[0].alpha == torch.tensor(0.3)
    with pytest.raises(RuntimeError, match="alpha must be given anew: it was a tensor"):
        fk.calibrate_(model)


@pytest.mark.parametrize("left_out", ["head.weight", "embedding.weight"])
@pytest.mark.parametrize(
    "change", [lambda model: model, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_both_tied_alphas_follow_one_saved_plain_weight(left_out, change):
    """As safetensors and transformers save them; both alphas follow, whichever is loaded first."""
    model, plain = change(quantized(Tied())), Tied(seed=1)
    state = plain.state_dict()
    del state[left_out]
    assert model.load_state_dict(state, strict=False).missing_keys == [left_out]
    assert_equal(model.state_dict(), quantized(Tied(seed=1)).state_dict())
    assert model.head.alpha is not model.embedding.alpha
    whole = nn.ModuleDict({"part": quantized(Tied()), "other": mlp()})  # which tells the model other names
    whole.load_state_dict({f"part.{key}": value for key, value in state.items()}, strict=False)
    assert_equal(whole["part"].state_dict(), model.state_dict())


def test_the_state_of_one_tied_module_sets_both_alphas():
    """Its alpha is no function of the weight any more, and goes with it."""
    model, other = quantized(Tied()), quantized(Tied(seed=1))
    with torch.no_grad():
        other.head.weight *= 0.9
    state = {k: v for k, v in other.state_dict().items() if not k.startswith("embedding")}
    model.load_state_dict(state, strict=False)
    assert_equal(model.state_dict(), other.state_dict())
