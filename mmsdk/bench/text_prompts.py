"""Prompts for benchmarks of text: stories, code, and texts to be written again with a small change."""

from __future__ import annotations

_STORY = (
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Tell me a story about two brothers who build a boat and sail across a lake.",
    "Write a story about an old clock that runs backwards.",
    "Tell a story about a dog that travels alone by train to the sea.",
)

_CODE = (
    "Write a Python class `Matrix` with methods to add, multiply and transpose, and a test for each method.",
    "Write a Python function for each of these sorting algorithms: bubble sort, insertion sort, selection sort.",
    "Write a Python class `BankAccount` with deposit, withdraw and transfer, which raise errors for wrong amounts.",
    "Write Python functions that convert between Celsius, Fahrenheit and Kelvin, all six of them, with docstrings.",
)

_REWRITE = (
    """Correct the spelling of this text and repeat all of it:

The harbour was queit in the early morning. A few fishermen were alredy on the pier, mending their nets and talking in
low voices. The first boat of the day left at six o'clock, and its engine could be heard long after it had dissapeared
behind the breakwater. Nobody on the pier looked up. They had seen it leave every day for twenty years, and every day
it had come back before noon with a small catch of herring and a large number of seagulls behind it.""",
    """Rename the function `total` to `sum_of_prices` in this program and repeat all of it:

```python
def total(prices, discount=0.0):
    \"\"\"Return the sum of all prices after a discount.\"\"\"
    result = 0.0
    for price in prices:
        if price < 0:
            raise ValueError("prices must not be negative")
        result += price
    return result * (1.0 - discount)


def print_receipt(prices, discount=0.0):
    for price in prices:
        print(f"{price:10.2f}")
    print(f"{total(prices, discount):10.2f}")


print_receipt([1.50, 2.25, 10.00], discount=0.1)
print_receipt([4.00, 4.00, 4.00])
```""",
    """Write this list again with the word "apple" in place of "pear", and change nothing else:

1. Wash two ripe pears and dry them with a clean towel.
2. Cut each pear into eight pieces and remove the core.
3. Melt two spoons of butter in a wide pan over a low flame.
4. Put the pieces of pear into the pan and turn them after three minutes.
5. Add a spoon of sugar and a little cinnamon to the pears.
6. Leave the pears in the pan until they are soft and golden.
7. Serve the pears with vanilla ice cream while they are warm.""",
    """Write this letter again, addressed to Mrs. Miller in place of Mr. Smith, and change nothing else:

Dear Mr. Smith,

thank you for your letter of the third of May. We are glad that you enjoyed your stay in our hotel, and we are sorry
that the heating in your room did not work on the second evening. As you suggested, we have asked an engineer to look at
all radiators on the third floor, and he has replaced two of them. We would be glad to welcome you again, Mr. Smith, and
to offer you a room with a view of the lake for the price of an ordinary one.

Yours sincerely,
the manager""",
)

PROMPTS: dict[str, tuple[str, ...]] = {"story": _STORY, "code": _CODE, "rewrite": _REWRITE}
