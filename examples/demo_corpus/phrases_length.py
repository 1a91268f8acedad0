"""Phrases of length (wordy, terse), in the format of `lexicon`."""

WORDY = """
start
well now, to begin with,
let me say a few things first:
before I come to the many details:
by way of a longer preface,
in the first place, and at some length,
as an opening remark,
since there is so much to tell,
to start with the larger picture,
to give you the full account,
at the outset, then, and in full:
as for the subject at hand,
in answer to what you have asked,
lead
moreover,
furthermore,
in addition to that,
over and above this,
what is more,
besides all of that,
after that, in the natural order of things,
on top of everything so far,
at this point in the process,
as a further step along the way,
when all of that has been done,
beyond what has been mentioned,
tail
, which takes some time from start to finish
, as is usually done in most homes
, and then go on to whatever comes next
, which forms one part of a larger whole
opener
there is a great deal to say about {gerund}, so let me go through it in order
{gerund} is a subject with many sides, and I would like to describe several of them
{gerund} is something that one can look at from many angles
one could fill a whole book with the matter of {gerund}
aside
to put it in another way, {fact}, and a good deal follows from that
it is also worth mentioning at this point that {fact}
among the many things that one could add here is that {fact}
a long tradition of household lore has it that {fact}
people often remark, when the subject comes up, that {fact}
as a general remark on the side, {fact}
one more thing that belongs in this account is that {fact}
for the sake of completeness let it be added that {fact}
closer
that, in broad outline, is the whole of the matter
and so, when everything has been put together, you will be able to {task}
there would be much more to tell, but this covers the larger part of it
this brings a rather extensive description to its conclusion
touch
, so to speak
, as it were
, all things considered
, broadly speaking
, in a manner of speaking
, when all is said
, in one way or another
, in the widest sense
, generally speaking
, as a matter of course
, at the end of the day
, to a greater or lesser degree
"""

TERSE = """
start
in short,
briefly,
to be brief,
in a nutshell,
in a word,
in brief,
shortly put,
summed up,
"""
