"""The tests that transformers runs on every model of its own, on this one.

Copied by `common_tests.py` into the tests of a release of transformers, whose mixins it takes; pytest does not collect
it here. `REFUSED` names the tests that do not apply, and why.
"""

import unittest

import torch
from transformers import WavLMConfig

from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression, MambaEMAModel

from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor
from ...test_sequence_feature_extraction_common import SequenceFeatureExtractionTestMixin

REFUSED = {
    "test_training_gradient_checkpointing_use_reentrant_true": "WavLM's backward pass would recurse without end",
    "test_model_get_set_embeddings": "there are no input embeddings; get_input_embeddings gives None",
}


class MambaEMAModelTester:
    """A model and its inputs, small enough for transformers' limits on sizes."""

    def __init__(self, parent, norm="layer", batch_size=3, samples=2_000):
        self.parent, self.norm, self.batch_size, self.samples = parent, norm, batch_size, samples
        self.is_training = True
        self.hidden_size, self.num_hidden_layers = 16, 2
        # Frames of 2,000 samples, what the mixins call the length of the sequence.
        self.seq_length = self.encoder_seq_length = 6

    def get_config(self):
        encoder = WavLMConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=20,
            feat_extract_norm=self.norm,
            do_stable_layer_norm=self.norm == "layer",
            conv_dim=(16,) * 7,
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            layerdrop=0.0,
            apply_spec_augment=False,
        )
        return MambaEMAConfig(encoder, hidden_size=16, num_hidden_layers=2, state_size=8, head_dim=8, dropout=0.1)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "input_values": floats_tensor([self.batch_size, self.samples], scale=1.0),
            "attention_mask": torch.ones(self.batch_size, self.samples, dtype=torch.long),
        }


class MambaEMAModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (MambaEMAModel, MambaEMAForRegression)
    test_resize_embeddings = False
    test_head_masking = False
    test_pruning = False
    has_attentions = False
    norm = "layer"

    def setUp(self):
        if self._testMethodName in REFUSED:
            self.skipTest(REFUSED[self._testMethodName])
        self.model_tester = MambaEMAModelTester(self, self.norm)
        self.config_tester = ConfigTester(
            self, config_class=MambaEMAConfig, has_text_modality=False, common_properties=["hidden_size"]
        )

        if self._testMethodName.startswith("test_training"):
            self.all_model_classes = (MambaEMAForRegression,)  # the other has no loss

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = dict(inputs_dict)
        if return_labels and model_class is MambaEMAForRegression:
            inputs["labels"] = torch.linspace(0.1, 0.9, 2 * self.model_tester.batch_size).view(-1, 2)
        return inputs


class MambaEMAGroupNormModelTest(MambaEMAModelTest):
    norm = "group"


class MambaEMAFeatureExtractorTester:
    def __init__(self, batch_size=7, min_samples=400, max_samples=2_000):
        self.batch_size, self.min_seq_length, self.max_seq_length = batch_size, min_samples, max_samples
        self.seq_length_diff = (max_samples - min_samples) // (batch_size - 1)
        self.feature_size, self.padding_value, self.sampling_rate = 1, 0.0, 16_000
        self.return_attention_mask, self.do_normalize = True, True

    def prepare_feat_extract_dict(self):
        return {
            "feature_size": self.feature_size,
            "padding_value": self.padding_value,
            "sampling_rate": self.sampling_rate,
            "do_normalize": self.do_normalize,
        }

    def prepare_inputs_for_common(self, equal_length=False, numpify=False):
        lengths = range(self.min_seq_length, self.max_seq_length, self.seq_length_diff)
        lengths = [self.max_seq_length] * self.batch_size if equal_length else lengths
        speech = [floats_tensor([length], scale=0.1) for length in lengths]
        return [waveform.numpy() if numpify else waveform.tolist() for waveform in speech]


class MambaEMAFeatureExtractionTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = MambaEMAFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = MambaEMAFeatureExtractorTester()
