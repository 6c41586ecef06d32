"""Texts on which a byte-level BPE tokenizer can go wrong."""

PROSE = [
    "",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "In the beginning God created the heaven and the earth.\n"
    "And the earth was without form, and void.",
    "unaffable antidisestablishmentarianism counterrevolutionaries",
]
CONTRACTIONS = [
    "I'm sure they'd say it's what we've done; you'll see, he isn't.",
    "I'M SURE THEY'D SAY IT'S WHAT WE'VE DONE; YOU'LL SEE, HE ISN'T.",
    "'tis 'Twas rock'n'roll o'clock 's 't 're",
    "It\u2019s typographic, isn\u2019t it? \u2018quoted\u2019",
    "\u017ft and '\u017f fold to s; the Kelvin sign \u212a folds to k",
]
WHITESPACE = [
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n\n",
    "\r\n",
    " \n ",
    "a  b   c    d",
    "   leading",
    "trailing   ",
    "tabs\t\tand\t spaces \t mixed",
    "line one\n\n  indented\r\n\r\n\ttabbed\n",
    "no\u00a0break\u2003em\u3000ideographic\u2028line\u2029paragraph\u0085next\u200bzero",
    "x \n\n y  \n  z \r ",
    "\x0b\x0c form feed",
]
DIGITS = [
    "1 12 123 1234 12345 1234567890",
    "3.14159e-10 0x1F 1,000,000.00 2024-01-31T23:59:59Z",
    "abc123def456 v1.2.3-rc4",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \uff11\uff12\uff13 \u2460\u00bd\u00b2\u2167",
]
CODE = [
    "def f(x: int) -> int:\n    return x ** 2 if x > 0 else -x  # comment\n",
    '#include <cstdint>\nint main() { for (int i = 0; i < 10; ++i) printf("%d\\n", i); }',
    '{"key": [1, 2.5, null, true], "path": "C:\\\\dir\\\\file.txt"}',
    "https://example.org/a/b?c=d&e=%20f#frag user@example.com",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~",
    "a_b__c snake_case camelCase SCREAMING_CASE kebab-case",
    "...!!!???---___===>>> <<< :: -> => != <=",
    " .leading !punct\n#tail\n",
]
MULTILINGUAL = [
    "Größe Straße naïve café Ærøskøbing Łódź Ångström İstanbul ıI",
    "Привет, мир! Съешь же ещё этих мягких французских булок.",
    "Ελληνικά: Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "你好，世界。这是一个测试！1234年",
    "日本語のテキスト、カタカナ、ひらがな。",
    "안녕하세요 세계 \u1112\u1161\u11ab\u1100\u1173\u11af",
    "مرحبا بالعالم، كيف الحال؟",
    "שלום עולם שָׁלוֹם",
    "नमस्ते दुनिया क्षत्रिय",
    "สวัสดีชาวโลก",
    "Xin chào thế giới Việt Nam",
]
COMBINING = [
    "e\u0301 vs \u00e9, n\u0303 vs \u00f1, A\u030a vs \u00c5 vs \u212b",
    "q\u0307\u0323 q\u0323\u0307 s\u0323\u0307 \u1e9b\u0323",
    "Z\u0335\u0321a\u0336\u0322l\u0337g\u0338o\u0321",
    "\u0301leading mark, digit 1\u0301 2",
    "\ufb01 \u2126 \u0344 \u0f73 \U0002f800",
]
EMOJI = [
    "😀😁 plain 👍🏽 skin 👨‍👩‍👧‍👦 family 🏳️‍🌈 flag 🇩🇪🇫🇷",
    "text☕️more ✔ ☃ ❤️",
    "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚𝟛 𐍈 𠜎",
]
CONTROLS = [
    "a\x00b\x01c\x1bd\x7fe",
    "\ufeffbyte order mark\ufeff",
    "\ufffd \ufffe \uffff \ue000 \U0010ffff \U000e0001",
    "\u202eright to left\u202c soft\u00adhyphen \u2060word\u2060joiner",
    "\u0080\u0099\u009f C1",
]
TEXTS = (
    PROSE + CONTRACTIONS + WHITESPACE + DIGITS + CODE + MULTILINGUAL + COMBINING + EMOJI + CONTROLS
)


def with_added(token: str) -> list[str]:
    """An added token in the places where its search may go wrong."""
    return [
        token,
        token * 3,
        f"{token}text",
        f"text{token}",
        f"a {token} b",
        f"a  {token}  b",
        f"\n{token}\n",
        token[:-1],
        token[1:],
        f"{token[:-1]}{token}",
        token.upper(),
        f"word{token}word 's{token}'s",
    ]
