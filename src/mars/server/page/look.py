"""How the page looks: Gradio's own fields in our colours. The rest is static/page.css."""

import gradio as gr

CLAY = gr.themes.Color(
    c50="#fdf4ef", c100="#fae4d8", c200="#f4c6b0", c300="#eca27f", c400="#e37c50", c500="#d5602f", c600="#b94a20",
    c700="#963a1a", c800="#792f18", c900="#642a18", c950="#36130a", name="clay",
)  # fmt: skip
STONE = gr.themes.colors.stone
SANS = (
    "system-ui", "-apple-system", "Segoe UI", "Roboto", "PingFang SC", "Hiragino Sans GB", "Microsoft YaHei",
    "Noto Sans CJK SC", "WenQuanYi Micro Hei", "sans-serif",
)  # fmt: skip


def theme() -> gr.themes.Base:
    """Warm greys, one accent, thin lines; fonts are the system's own."""
    found = gr.themes.Base(
        primary_hue=CLAY, secondary_hue=STONE, neutral_hue=STONE, radius_size=gr.themes.sizes.radius_lg,
        font=SANS, font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )  # fmt: skip
    return found.set(
        body_background_fill="#faf8f5",
        body_background_fill_dark="#151210",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1e1a17",
        background_fill_secondary="#f5f1ec",
        background_fill_secondary_dark="#191512",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_shadow_dark="none",
        block_padding="0px",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        block_title_text_color="*neutral_600",
        block_title_text_color_dark="*neutral_400",
        border_color_primary="#e4ddd5",
        border_color_primary_dark="#38312b",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1e1a17",
        input_border_width="1px",
        input_border_width_dark="1px",
        input_border_color="#e4ddd5",
        input_border_color_dark="#38312b",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_500",
        input_shadow_focus="0 0 0 3px color-mix(in srgb, *primary_500 22%, transparent)",
        input_shadow_focus_dark="0 0 0 3px color-mix(in srgb, *primary_500 30%, transparent)",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="transparent",
        button_secondary_background_fill_dark="transparent",
        button_secondary_border_color="#d8cfc5",
        button_secondary_border_color_dark="#4a4139",
        button_border_width="1px",
        slider_color="*primary_500",
        slider_color_dark="*primary_500",
    )
