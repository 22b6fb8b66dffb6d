"""Every text of the page, in English and in Chinese."""

from collections.abc import Mapping

LANGUAGES = ("en", "zh")

WORDS: Mapping[str, tuple[str, str]] = {
    # the frame
    "title": ("MARS · draw with words", "MARS · 以文作画"),
    "other_language": ("中文", "English"),
    "other_language_hint": ("这一页的中文版", "This page in English"),
    "theme": ("Light or dark", "浅色或深色"),
    "tab_draw": ("Draw", "作画"),
    "tab_edit": ("Edit", "修改"),
    "tab_describe": ("Describe", "描述"),
    "tab_write": ("Write", "图文"),
    "stop": ("Stop", "停止"),
    # drawing
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": ("What shall be drawn? In English or Chinese.", "想画什么？中文或英文都可以。"),
    "examples": ("Examples", "示例"),
    "go_draw": ("Draw", "开始作画"),
    "count": ("Pictures", "张数"),
    "size": ("Size", "尺寸"),
    "settings": ("Settings", "设置"),
    "negative": ("Keep away from", "避免出现"),
    "negative_hint": ("what shall not be seen", "不想看到的内容"),
    "seed": ("Seed", "随机种子"),
    "seed_hint": ("empty: a new one each time", "留空：每次随机"),
    "guidance": ("Guidance", "引导强度"),
    "temperature": ("Temperature", "温度"),
    "top_k": ("Top-k (0: all)", "Top-k（0 为全部）"),
    "top_p": ("Top-p", "Top-p"),
    "candidates": ("Candidates, the likeliest is kept", "候选数，保留最可能的一张"),
    "gallery": ("Pictures", "画作"),
    "gallery_empty": ("Pictures appear here.", "画作会出现在这里。"),
    "picture_of": ("Picture {number}, seed {seed}", "第 {number} 张，种子 {seed}"),
    "being_drawn": ("Picture {number} is being drawn", "第 {number} 张正在绘制"),
    # what can be done with a picture
    "do_upscale": ("Upscale", "放大"),
    "do_edit": ("Edit", "修改"),
    "do_describe": ("Describe", "描述"),
    "do_save": ("Save", "保存"),
    "do_recall": ("Settings again", "取回设置"),
    "do_remove": ("Remove", "移除"),
    "cannot_upscale": ("{model} was not trained to upscale.", "{model} 没有经过放大训练。"),
    # pictures that are given
    "choose": ("Choose a picture", "选择图片"),
    "choose_hint": ("or drop or paste one: PNG, JPEG, WebP", "也可拖放或粘贴：PNG、JPEG、WebP"),
    "choose_other": ("Another picture", "换一张"),
    # editing
    "how": ("How", "方式"),
    "how_paint": ("Paint anew", "重画局部"),
    "how_extend": ("Extend", "扩展画面"),
    "how_vary": ("Vary", "变化"),
    "edit_prompt": ("What the whole picture is to show", "整幅画的内容"),
    "strength": ("How much changes", "变化程度"),
    "sides": ("Sides", "方向"),
    "side_left": ("left", "左"),
    "side_above": ("above", "上"),
    "side_right": ("right", "右"),
    "side_below": ("below", "下"),
    "margin": ("Margin, share of the picture", "扩展比例"),
    "go_edit": ("Draw anew", "重新绘制"),
    "mask": (
        "Mask: paint what is drawn anew. Arrow keys move, space paints, brackets change the brush.",
        "蒙版：涂抹要重画的部分。方向键移动，空格涂抹，方括号调节笔刷。",
    ),
    "brush": ("Brush", "笔刷"),
    "paint": ("Paint", "涂抹"),
    "erase": ("Erase", "擦除"),
    "clear": ("Clear", "清空"),
    # describing
    "go_describe": ("Describe", "描述图片"),
    "in_english": ("English", "英文"),
    "in_chinese": ("Chinese", "中文"),
    "draw_this": ("Draw this", "画出来"),
    "captions_empty": ("What the picture shows, in both languages.", "图片内容，中英文各一句。"),
    # writing
    "answer_with": ("Answer with", "回答方式"),
    "with_both": ("text and pictures", "文字和图画"),
    "with_text": ("text", "文字"),
    "say": ("Say something", "说点什么"),
    "say_hint": (
        "The model goes on from here, and paints where it wants to.", "模型会接着写下去，并在想画的地方作画。",
    ),
    "go_write": ("Send", "发送"),
    "anew": ("Start anew", "重新开始"),
    "story": ("Conversation", "对话"),
    "story_empty": ("Text and pictures take turns here.", "文字与图画会在这里交替出现。"),
    # history
    "shelf": ("Your pictures", "你的画作"),
    "shelf_hint": (
        "Kept in this browser alone. Drop one of our PNG files anywhere to have its settings again.",
        "仅保存在此浏览器中。把本站的 PNG 拖到页面任意处，即可取回其设置。",
    ),
    "open_png": ("Open a PNG", "打开 PNG"),
    # how it goes
    "waiting": ("Waiting… {seconds} s", "排队中…… {seconds} 秒"),
    "drawing": ("Drawing… {seconds} s", "绘制中…… {seconds} 秒"),
    "reading": ("Reading… {seconds} s", "读图中…… {seconds} 秒"),
    "writing": ("Writing… {seconds} s", "书写中…… {seconds} 秒"),
    "drawn": ("Done in {seconds} s.", "完成，用时 {seconds} 秒。"),
    "stopped": ("Stopped.", "已停止。"),
    "recalled": ("The settings of this picture are back.", "已取回这张图片的设置。"),
    # what goes wrong
    "no_prompt": ("Say what to draw.", "请先写下想画的内容。"),
    "no_text": ("Say something first.", "请先说点什么。"),
    "no_picture": ("Choose a picture first.", "请先选择一张图片。"),
    "no_mask": ("Paint over what is to be drawn anew.", "请涂抹要重画的部分。"),
    "no_side": ("Choose a side to extend.", "请选择要扩展的方向。"),
    "bad_seed": ("The seed must be a whole number from 0 on, or empty.", "种子须为不小于 0 的整数，或留空。"),
    "bad_picture": (
        "This picture cannot be read; give a PNG, JPEG or WebP file.",
        "无法读取这张图片，请使用 PNG、JPEG 或 WebP 文件。",
    ),
    "bad_request": ("The page sent what cannot be used; load it again.", "页面发送的内容无效，请刷新页面。"),
    "no_settings": ("This picture does not say how it was drawn.", "这张图片没有记录绘制方式。"),
    "full": ("Too many are drawing just now; try again in {seconds} s.", "当前使用的人太多，请在 {seconds} 秒后再试。"),
    "too_slow": ("This took too long; ask for less.", "耗时过长，请减少数量。"),
    "ending": ("The server is shutting down; try again later.", "服务器正在关闭，请稍后再试。"),
    "moderated": ("The server does not draw this: {reason}", "服务器拒绝了这一请求：{reason}"),
    "failed": ("The server failed; its log says why (request {id}).", "服务器出错，详情见日志（请求 {id}）。"),
    "refused": ("This cannot be done: {reason}", "无法完成：{reason}"),
    # signing in
    "key": ("API key", "API 密钥"),
    "key_why": ("This server asks for a key.", "此服务器需要密钥。"),
    "key_wrong": ("The server does not know this key.", "服务器不认识这个密钥。"),
    "go_in": ("Enter", "进入"),
}  # fmt: skip
"""By name: English, Chinese."""

EXAMPLES: Mapping[str, tuple[str, ...]] = {
    "en": ("red apple", "sunflower", "rocket", "lemon", "strawberry", "clown face"),
    "zh": ("红苹果", "向日葵", "火箭", "企鹅", "太阳", "香蕉"),
}


class Words:
    """The texts of one language."""

    def __init__(self, language: str) -> None:
        self.language = language
        self._column = LANGUAGES.index(language)

    def __call__(self, name: str, **values: object) -> str:
        """A text, with values in its places."""
        text = WORDS[name][self._column]
        return text.format(**values) if values else text

    @property
    def other(self) -> str:
        """The other language."""
        return LANGUAGES[1 - self._column]

    @property
    def all(self) -> dict[str, str]:
        """All of them, for the browser."""
        return {name: pair[self._column] for name, pair in WORDS.items()}


def preferred(accept_language: str) -> str:
    """The language of a browser's `Accept-Language`: the first of ours that it names; English if none is."""
    for part in accept_language.split(","):
        tag = part.partition(";")[0].strip().lower()
        if tag.split("-")[0] in LANGUAGES:
            return tag.split("-")[0]
    return "en"
