"""Chat templates that write the same text as the published templates of the model families.

Few templates here support tools.
"""

ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
GENERATION = "{%% if add_generation_prompt %%}{{ '%s' }}{%% endif %%}"


def content(image: str = "", *, trim: bool = False, generation: bool = False) -> str:
    """Returns Jinja code that writes a message's content: a text, or a list of texts and images.

    Args:
        image: Text that stands for an image.
        trim: Whether texts are trimmed.
        generation: Whether texts in lists lie in a ``{% generation %}`` block.
    """
    text = "{{ p.text%s }}" % ("|trim" if trim else "")
    if generation:
        text = "{% generation %}" + text + "{% endgeneration %}"
    parts = "{% for p in m.content %}{% if p.type == 'image' %}{{ '" + image + "' }}{% else %}" + text
    whole = "{{ m.content%s }}" % ("|trim" if trim else "")
    return "{% if m.content is string %}" + whole + "{% else %}" + parts + "{% endif %}{% endfor %}{% endif %}"


def images_first(image: str, text: str = "{{ p.text }}") -> str:
    """Returns Jinja code that writes a message's images before its texts."""
    return (
        "{% for p in m.content | selectattr('type', 'equalto', 'image') %}{{ '" + image + "' }}{% endfor %}"
        "{% for p in m.content | selectattr('type', 'equalto', 'text') %}" + text + "{% endfor %}"
    )


def chatml(image: str = "", *, begin: str = "", default_system: str | None = None) -> str:
    """Returns the ChatML template of SmolLM2, Qwen, InternLM2 and InternVL."""
    default = ""
    if default_system is not None:
        default = (
            "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n" + default_system + "<|im_end|>\\n' }}"
            "{% endif %}"
        )
    return (
        begin
        + default
        + "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        + content(image)
        + "{{ '<|im_end|>\\n' }}{% endfor %}"
        + GENERATION % "<|im_start|>assistant\\n"
    )


SMOLLM2 = chatml(default_system="You are a helpful AI assistant named SmolLM, trained by Hugging Face")
QWEN25 = chatml(default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.")
INTERNLM2 = chatml(begin="{{ bos_token }}")
INTERNVL = chatml("<IMG_CONTEXT>\\n")
QWEN25_VL = chatml("<|vision_start|><|image_pad|><|vision_end|>", default_system="You are a helpful assistant.")
QWEN3_VL = chatml("<|vision_start|><|image_pad|><|vision_end|>")
MINICPM_V = chatml("<|image_pad|>\\n")

_QWEN3_TURN = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content %}{% set thought = '' %}{% if '</think>' in m.content %}"
    "{% set thought = m.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}"
    "{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}"
    "{% else %}{{ answer }}{% endif %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
QWEN3 = (
    _QWEN3_TURN + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
QWEN3_THINKING_2507 = _QWEN3_TURN + GENERATION % "<|im_start|>assistant\\n<think>\\n"

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "{% if loop.first and system %}"
    "{% set text = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m.content %}{% else %}{% set text = m.content %}"
    "{% endif %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + text.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + text.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_LLAMA3_TURNS = (
    "{% for m in turns %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content|trim }}"
    "{{ '<|eot_id|>' }}{% endfor %}" + GENERATION % "<|start_header_id|>assistant<|end_header_id|>\\n\\n"
)
LLAMA3 = "{{ bos_token }}{% set turns = messages %}" + _LLAMA3_TURNS
LLAMA32 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0].content|trim %}{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}"
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' }}"
    "{{ date_string + '\\n\\n' + system + '<|eot_id|>' }}" + _LLAMA3_TURNS
)
LLAMA31 = "{% set date_string = '26 Jul 2024' %}" + LLAMA32

_MISTRAL_SYSTEM = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\\n\\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
)
MISTRAL_V1 = (
    _MISTRAL_SYSTEM + "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ ' [INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (  # the system's text stands in the last user's turn
    _MISTRAL_SYSTEM + "{% for m in turns %}" + ALTERNATE + "{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% else %}{{ ' ' + m.content|trim + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V7 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'system' %}{{ '[SYSTEM_PROMPT] ' + m.content + '[/SYSTEM_PROMPT]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_SMALL_31 = (  # v7 with Tekken's tokens and images
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set system = messages[0].content if messages[0].content is string else messages[0].content[0].text %}"
    "{% else %}{% set turns = messages %}"
    "{% set system = 'You are Mistral Small 3. The current date is ' + strftime_now('%Y-%m-%d') + '.' %}{% endif %}"
    "{{ '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{% for m in turns %}"
    + ALTERNATE
    + "{% if m.role == 'user' %}"
    "{{ '[INST]' }}" + content("[IMG]") + "{{ '[/INST]' }}{% else %}"
    "{{ (m.content if m.content is string else m.content[0].text) + eos_token }}{% endif %}{% endfor %}"
)

GEMMA2 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}" + ALTERNATE + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) }}"
    "{{ '\\n' + m.content|trim + '<end_of_turn>\\n' }}{% endfor %}" + GENERATION % "<start_of_turn>model\\n"
)
GEMMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = "
    "(messages[0].content if messages[0].content is string else messages[0].content[0].text) + '\\n\\n' %}"
    "{% else %}{% set turns = messages %}{% set system = '' %}{% endif %}{% for m in turns %}"
    + ALTERNATE
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}"
    "{{ system if loop.first else '' }}"
    + content("<start_of_image>", trim=True)
    + "{{ '<end_of_turn>\\n' }}{% endfor %}"
    + GENERATION % "<start_of_turn>model\\n"
)

PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
PHI3_FIRST = (  # the template of Phi-3's release: add_generation_prompt is ignored
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|user|>\\n' + m.content + '<|end|>\\n<|assistant|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ m.content + '<|end|>\\n' }}{% endif %}{% endfor %}"
)
PHI4 = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<|im_start|>system<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% elif m.role == 'user' %}"
    "{{ '<|im_start|>user<|im_sep|>' + m.content + '<|im_end|><|im_start|>assistant<|im_sep|>' }}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
)

DEEPSEEK_V2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n\\n' }}"
    "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}{% else %}{{ m.content + '\\n\\n' }}"
    "{% endif %}{% endfor %}" + GENERATION % "Assistant:"
)
_DEEPSEEK_R1_TURNS = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endif %}{% endfor %}{{ bos_token + ns.system }}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' %}{% set text = m.content %}"
    "{% if '</think>' in text %}{% set text = text.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + text + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
)
DEEPSEEK_R1 = _DEEPSEEK_R1_TURNS + GENERATION % "<｜Assistant｜><think>\\n"
DEEPSEEK_R1_FIRST = _DEEPSEEK_R1_TURNS + GENERATION % "<｜Assistant｜>"

_GLM_IMAGE = "<|begin_of_image|><|image|><|end_of_image|>"
GLM4 = (  # nothing follows a response: the header of the next turn ends it
    "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}" + content(_GLM_IMAGE) + "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
GLM41V_THINKING = GLM4.replace("{{ '<|assistant|>\\n' }}", "{{ '<|assistant|>\\n<think>' }}")

_SPEAKER = (
    "{% for m in messages %}{{ m.role|capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    + content("<image>")
    + "{{ '<end_of_utterance>\\n' }}{% endfor %}"
    + GENERATION % "Assistant:"
)
SMOLVLM = "<|im_start|>" + _SPEAKER
IDEFICS3 = "<|begin_of_text|>" + _SPEAKER

LLAVA_15 = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}"
    + images_first("<image>\\n", "{{ p.text + ' ' }}")
    + "{% endfor %}"
    + GENERATION % "ASSISTANT:"
)
LLAVA_NEXT_MISTRAL = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>\\n' + m.content[0].text + '\\n<</SYS>>\\n\\n' }}"
    "{% elif m.role == 'user' %}{{ '[INST] ' }}" + images_first("<image>\\n") + "{{ ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + '</s> ' }}{% endif %}{% endfor %}"
)
LLAVA_ONEVISION = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    + images_first("<image>\\n", "{% generation %}{{ p.text }}{% endgeneration %}")
    + "{{ '<|im_end|>\\n' }}{% endfor %}"
    + GENERATION % "<|im_start|>assistant\\n"
)

VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + '\\n' }}{% else %}{{ 'ASSISTANT: ' + m.content + '</s>\\n' }}{% endif %}{% endfor %}"
    + GENERATION
    % "ASSISTANT:"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for m in messages %}{{ '<|START_OF_TURN_TOKEN|><|' + "
    "{'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] + '_TOKEN|>' + m.content.strip() }}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}" + GENERATION % "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
)
GRANITE = (
    "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}"
    "{% if loop.last and add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
    "{% endfor %}"
)


# ---- Templates with tools, in the forms of Qwen2.5 and Qwen3-VL, of Llama 3.1, and of Hermes


def _tool_turns(content: str) -> str:
    """Returns Jinja code for messages with tools.

    Tool calls become JSON in <tool_call>. Tool results become user turns.
    """
    return (
        "{% for m in messages %}{% if m.role == 'tool' %}"
        "{% if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
        "{{ '\\n<tool_response>\\n' }}" + content + "{{ '\\n</tool_response>' }}"
        "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}"
        "{% elif not (m.role == 'system' and loop.first) %}{{ '<|im_start|>' + m.role + '\\n' }}"
        + content
        + "{% for c in m.tool_calls or [] %}{{ '\\n' if m.content or not loop.first }}"
        '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
        "{{ c.function.arguments | tojson }}"
        "{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}"
        + GENERATION
        % "<|im_start|>assistant\\n"
    )


def qwen_tools(image: str = "") -> str:
    """Returns Qwen's template with tools. The system message describes the tools. ``image`` marks an image."""
    system = content(image).replace("m.content", "messages[0].content")
    return (
        "{{ '<|im_start|>system\\n' }}{% if messages[0].role == 'system' %}" + system + "{% else %}"
        "{{ 'You are a helpful assistant.' }}{% endif %}{% if tools %}{{ '\\n\\n# Tools\\n<tools>' }}"
        "{% for t in tools %}{{ '\\n' }}{{ t | tojson }}{% endfor %}{{ '\\n</tools>' }}{% endif %}"
        "{{ '<|im_end|>\\n' }}" + _tool_turns(content(image))
    )


QWEN25_TOOLS = qwen_tools()
QWEN3_VL_TOOLS = qwen_tools("<|vision_start|><|image_pad|><|vision_end|>")
LLAMA31_TOOLS = (  # the tools stand in the first turn of the user, results are JSON, and a turn has one call at most
    "{{ bos_token }}{% set turns = messages %}{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set turns = messages[1:] %}{% set system = messages[0].content|trim %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}"
    "{% for m in turns %}{% if m.role == 'tool' %}"
    "{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}{{ {'output': m.content} | tojson }}"
    "{% elif 'tool_calls' in m %}"
    "{% if m.tool_calls|length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}"
    '{{ \'<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "\' + m.tool_calls[0].function.name }}'
    "{{ '\", \"parameters\": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}"
    "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}"
    "{% if loop.first and tools %}{% for t in tools %}{{ t | tojson(indent=4) }}{{ '\\n\\n' }}{% endfor %}{% endif %}"
    "{{ m.content|trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    + GENERATION
    % "<|start_header_id|>assistant<|end_header_id|>\\n\\n"
)
