"""What others published about the real checkpoints: recorded values only, each with its source.

ARTWORK: a run of llava-hf/llava-v1.6-mistral-7b-hf with transformers 4.56.0 on an image 1,100 pixels wide and 808 high.
    https://github.com/MouYongli/DeepHallu at commit 98655a4e5881755f0fa624e3da0c598f23cb4add: docs/llava_next.md has
    the image's size and the shape of input_ids, the outputs of notebooks/exploration_llava_outputs.ipynb all ids.
RADAR: transformers' conversion script for LLaVA-NeXT, which asserts that a converted checkpoint gives these values.
    https://github.com/huggingface/transformers at commit 063b32f6798ec8ec747dafd5790679fafee38f6f,
    src/transformers/models/llava_next/convert_llava_next_weights_to_hf.py. It runs in float16 on a GPU and compares
    the logits with atol=1e-4, which in float16 is equality at these sizes. The prompt's ids are in a file that it
    downloads (llava_1_6_input_ids.pt of the data set nielsr/test-image): they are those of LLaVA's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

ARTWORK_SIZE = (1100, 808)  # width, height
ARTWORK_QUESTION = "Is this artwork created by linard, jacques? Please answer yes or no."
ARTWORK_NUM_IDS, ARTWORK_NUM_IMAGE_TOKENS = 2369, 2340
ARTWORK_BEFORE_IMAGE = [1, 733, 16289, 28793, 28705]
ARTWORK_AFTER_IMAGE = [
    28705,
    13,
    2301,
    456,
    27261,
    3859,
    486,
    12893,
    488,
    28725,
    461,
    323,
    5958,
    28804,
    5919,
    4372,
    5081,
    442,
    708,
    28723,
    733,
    28748,
    16289,
    28793,
]
# What the checkpoint answered, greedily. It ends as LLaVA's training did, with a space before </s>.
ARTWORK_ANSWER = (
    'No, the artwork is not created by Jacques-Louis David. The painting you\'ve shown is "Still Life with Fruit" by '
    "Willem Kalf, a Dutch still life painter."
)
ARTWORK_ANSWER_IDS = [
    1770,
    28725,
    272,
    27261,
    349,
    459,
    3859,
    486,
    19355,
    28733,
    24618,
    278,
    4417,
    28723,
    415,
    11514,
    368,
    28742,
    333,
    4894,
    349,
    345,
    718,
    425,
    5372,
    395,
    401,
    6424,
    28739,
    486,
    394,
    2457,
    28719,
    524,
    2121,
    28725,
    264,
    14738,
    1309,
    1411,
    24372,
    28723,
    28705,
    2,
]

RADAR_URL = (
    "https://github.com/haotian-liu/LLaVA/blob/1a91fc274d7c35a9b50b3cb29c4247ae5837ce39/images/llava_v1_5_radar.jpg"
    "?raw=true"
)
RADAR_SIZE = (1024, 899)  # width, height; image_sizes is [[899, 1024]]
RADAR_QUESTION = "What is shown in this image?"


@dataclass(frozen=True)
class Radar:
    """One checkpoint's values.

    Attributes:
        conversation: name of its conversation format.
        system: the system message of the prompt, None for none.
        prompt: the prompt's text.
        logits: logits[0, :3, :3] of one forward over the prompt and the image.
        text: prompt and answer decoded without special tokens, stripped; 100 new tokens at most, greedy.
    """

    conversation: str
    system: str | None
    prompt: str
    logits: tuple[tuple[float, float, float], ...]
    text: str


OPENING = (  # Vicuna's system message in the script
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
RADAR = {
    "llava-hf/llava-v1.6-mistral-7b-hf": Radar(
        "llava_v16_mistral",
        None,
        "[INST] <image>\nWhat is shown in this image? [/INST]",
        ((-4.8555, -4.6992, -0.1996), (-10.5703, -10.7344, -2.7246), (-7.0391, -7.3672, -0.2634)),
        "[INST]  \nWhat is shown in this image? [/INST] The image appears to be a radar chart, which is a type"
        " of multi-dimensional plot that displays data in the form of a two-dimensional chart of three or "
        "more quantitative variables represented on axes starting from the same point.\n\nIn this particular "
        'radar chart, there are several axes labeled with different metrics or benchmarks, such as "MMM-Vet,"'
        ' "MMM-Bench," "LLaVA-Bench," "SLED-Bench," "',
    ),
    "llava-hf/llava-v1.6-vicuna-7b-hf": Radar(
        "llava_v16_vicuna",
        OPENING,
        OPENING + " USER: <image>\nWhat is shown in this image? ASSISTANT:",
        ((1.4883, 0.9976, -0.6992), (-9.7031, -5.7031, -1.5557), (-5.1328, -5.5586, 8.8281)),
        OPENING
        + " USER:  \nWhat is shown in this image? ASSISTANT: The image appears to be a graphical representation "
        "of a benchmarking study comparing the performance of various models or systems. It's a scatter plot "
        "with a circular layout, where each point represents a different model or system, and the axes "
        "represent different metrics or dimensions of comparison.\n\nThe metrics are likely related to machine "
        'learning or artificial intelligence performance, as indicated by the terms like "BLIP-2," "Instruct '
        'BLIP," "POE," "QWA," "V',
    ),
}
