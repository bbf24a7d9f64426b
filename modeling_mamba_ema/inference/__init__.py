"""Using a trained model without writing model code: live conversations, long recordings, the command line, ONNX."""

from .tracker import EmotionTracker, TurnEmotion

__all__ = ["EmotionTracker", "TurnEmotion"]
