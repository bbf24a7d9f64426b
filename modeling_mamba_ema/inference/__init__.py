"""Using a trained model without writing model code: live conversations, long recordings, the command line, ONNX.

What needs no more than the model does is here; recordings (`.recording`, `.timeline`), speech detection
(`.voice_activity`) and ONNX (`.onnx_export`) need extras and are imported from their modules.
"""

from .segments import Segment, read_segments
from .tracker import EmotionTracker, TurnEmotion

__all__ = ["EmotionTracker", "Segment", "TurnEmotion", "read_segments"]
