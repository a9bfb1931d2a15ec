"""The UNet of Stable Diffusion and SDXL: what its arguments are."""

from darkroom_server.engine.pipelines.arguments import ArgumentSpec, Kind

UNET = ArgumentSpec(
    denoiser="UNet2DConditionModel",
    kinds={
        "sample": Kind.ROWS,
        "timestep": Kind.TIMESTEP,
        "encoder_hidden_states": Kind.ROWS,
        "timestep_cond": Kind.ROWS,
        "added_cond_kwargs.text_embeds": Kind.ROWS,
        "added_cond_kwargs.time_ids": Kind.ROWS,
        # A list with a tensor for each IP-Adapter.
        "added_cond_kwargs.image_embeds": Kind.PER_BLOCK,
        "return_dict": Kind.EQUAL,
    },
    rows_in="sample",
    signature="77d680c563abf52d",
    diffusers="0.42",
)
