"""The parts of a pipeline that the engine calls: schedulers, encoders, denoiser, decoder."""
