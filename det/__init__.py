"""Detection and instance segmentation with MMDetection: `backbone` and `neck` register there, `configs` trains."""
