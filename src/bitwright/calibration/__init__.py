"""Text to token windows, and statistics of what they make a site see."""

from bitwright.calibration.statistics import CrossSum as CrossSum
from bitwright.calibration.statistics import HessianSum as HessianSum
from bitwright.calibration.statistics import channel_energy as channel_energy
from bitwright.calibration.statistics import row_blocks as row_blocks
from bitwright.calibration.statistics import wave_sequences as wave_sequences
from bitwright.calibration.streams import Stream as Stream
from bitwright.calibration.text import Text as Text
from bitwright.calibration.text import consecutive_windows as consecutive_windows
from bitwright.calibration.text import load_tokenizer as load_tokenizer
from bitwright.calibration.text import random_starts as random_starts
from bitwright.calibration.text import random_windows as random_windows
from bitwright.calibration.text import read_text as read_text
from bitwright.calibration.text import text_of as text_of
from bitwright.calibration.text import tokenize as tokenize
