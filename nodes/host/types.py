"""The pack's own kinds of links between nodes."""

from comfy_api.latest import io

DatasetType = io.Custom("PIXART_DATASET")
FeaturesType = io.Custom("PIXART_FEATURES")
REPORT_TIP = "What is in it, and what was wrong with which picture."
