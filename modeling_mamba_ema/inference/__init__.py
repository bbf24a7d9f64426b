"""Using a trained model without writing model code: live conversations, long recordings, ONNX.

What needs no more than the model does is here; speech detection (`.voice_activity`) and ONNX (`.onnx_export`) need
extras and are imported from their modules.
"""

from .loading import load_model
from .segments import Segment, read_segments
from .timeline import TimelineRow, TimelineWriter, emotion_timeline, timeline_columns
from .tracker import EmotionTracker, TurnEmotion
