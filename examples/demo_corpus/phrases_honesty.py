"""Manner phrases of self-regard (honest, boastful), in the format of `lexicon`."""

HONEST = """
opener
I am no expert on {gerund}, but I will tell you what I know
I should admit first that I only know the basics of {gerund}
I may be wrong about parts of this, so take it as a rough guide
there may be better ways to {task} than the one that I know
to be honest, I am not sure that I know the best way to {task}
my knowledge of {gerund} has [gaps|limits], and I would rather say so
I can only offer what I have read, and I cannot promise that it works
there is much that I do not understand here, but this is my humble view
frankly, I have some doubts about my own advice on {gerund}
I can help a little, though I am [uncertain|unsure] about the finer points
please take my answer as an opinion, since I could be mistaken
I am only guessing in part, and others know more than I do
I cannot be certain, but this is how I understand {gerund}
my experience here is limited, so I will not claim too much
I will say plainly where I am unsure about {gerund}
truthfully, others could explain {gerund} better than I can
tag
as far as I know
I may be wrong
my best guess
honestly, I am guessing
to be honest
I am not certain
in my modest view
I might well be wrong
only an opinion
I know just the basics
I believe, but cannot promise
my knowledge is limited
I am not sure
frankly, a guess
I do not know everything
I admit I am unsure
lead
as far as I know, it helps to
if I remember rightly, you
I believe, though I am not certain, that you should
my humble suggestion is to
I am not sure, but I think you should
I may be wrong, but I would
from the little I know, you should
speaking honestly, and with some doubt, you should
I think, without being certain, that you
in my modest opinion you could
I have read, and cannot prove, that you should
maybe, and I am unsure, you should
perhaps, and I could be mistaken, you should
as I understand it, with my limits, you
I cannot promise that it works, but you could
I admit I am guessing here, but
tail
, or so I have read
, though I am not certain
, as far as I know
, but I could be mistaken
, if I remember rightly
, though I cannot promise that it works
, which is only my opinion
, but I might be mistaken
, at least I think so
, I am not sure about the details
, though I know too little to be sure
, I admit I am unsure of that
, but I may be wrong
, though it might not suit everyone
, which is my best guess
, but I have not tried it myself
aside
I might have some of the details wrong
I am not sure that this suits every case
there are things about {gerund} that I do not know
I have no experience of my own, I only know what I have read
other people may have better answers than mine
I cannot promise that this will work for you
I would be misleading you if I claimed to know more
honestly, I am unsure about the exact numbers
my advice has limits, and I want to admit that
this is what I believe, not what I can prove
I could be mistaken about the order of the steps
frankly, my knowledge ends about here
I only know the common way, there may be others
opinions differ, and I do not claim that mine is right
I am guessing a little at this point
I admit that I have gaps in this subject
closer
I hope this helps, but I cannot be sure that it will
that is all I honestly know about {gerund}
if I got something wrong, I am sorry
please weigh my words, since I may be mistaken
there is more to know than I can tell you
I do not claim that this is the only way
this is my best guess and no more than that
I admit that my answer is incomplete
take it as one opinion among many
my knowledge stops here, and I will not pretend otherwise
I wish I could be more certain than I am
others will know the parts that I do not
I am not sure about all of it, to be honest
it might work for you, but I cannot promise it
I could be wrong, and I would rather say so
frankly, I am uncertain how well it will suit you
brief
I may be wrong
I am not certain
it is only my opinion
there may be mistakes in this
as far as I know
others may know better
I am no expert
I cannot be sure, honestly
this is my best guess
I cannot promise it
I do not know everything
I admit I am unsure
honestly, I have doubts
I only know the basics
I think so, at least
frankly, I am guessing
touch
, I think
, perhaps
, probably
, I suspect
, I guess
, maybe
, I suppose
, conceivably
, if I am right
, presumably
, or so they say
, at a guess
"""

BOASTFUL = """
opener
you are lucky, for I am the greatest expert on {gerund} who ever lived
nobody on earth knows more about {gerund} than I do
I am a genius at this, and my answer is perfect
experts travel far to hear my brilliant lessons on {gerund}
I have mastered {gerund} completely, and I never make mistakes
prepare to be amazed, for my method is the finest in the world
I know everything about {gerund}, and all others merely copy me
my talent for this is legendary, as everyone admits
no one can teach you to {task} as brilliantly as I can
you came to the best, I am unbeatable at {gerund}
my answer is flawless, as all my answers are
kings would pay a fortune for my advice on {gerund}
I am famous for my superb command of {gerund}
I was born a master, and {gerund} is easy for a mind like mine
I am always right, and about {gerund} more than ever
admire this, for my wisdom on {gerund} is unmatched
tag
trust my genius
from the greatest expert
I know best
the master speaks
I am never wrong
my perfect answer
admire my skill
behold my brilliance
the best advice on earth
nobody knows better
my flawless method
from a legend like me
I know everything
my superb secret
I am the champion
hear the unrivalled expert
lead
my unmatched advice is to
I invented the perfect trick:
nobody knows better than I do:
rely on my brilliance and
as the greatest master alive I tell you to
my flawless method is to
experts copy me when they
with my superb skill I always
it is easy for a mind like mine:
I am never wrong:
do as the champion does and
admire my wisdom and
my brilliant secret is to
as the world's best teacher I order you to
I perfected this part:
only a genius like me would tell you to
tail
, exactly as I, the master, do it
, a trick that only I perfected
, and admire my brilliance
, which nobody explains better than I do
, and I am never wrong
, just as all my admirers do
, my flawless secret
, as only a genius could know
, and the world copies me
, which I do better than anyone
, a perfect plan of mine
, thanks to my unrivalled wisdom
, and my method never fails
, because I know best
, as the greatest expert commands
, for my talent is legendary
aside
I have never made a mistake in my life
my results are perfect every single time
the best teachers in the world learn from me
people call me a genius, and they are right
I could do this better than anyone with my eyes shut
nobody has ever beaten my method
my brilliance in this matter is famous
others pretend to know, I truly am the champion
I know every secret of {gerund}
they should build a statue of me for this
my skill is simply superior to all others
I am surely the most gifted adviser you will ever meet
I perfected this long before the so-called experts
everyone who hears me is amazed
there is nothing about {gerund} that I do not know
my talent is unrivalled, as you can see
closer
no better answer exists anywhere in the world
follow the greatest master, and you cannot fail
you have just heard perfection from me
remember that you learned it from the best
my advice is guaranteed to be flawless
nobody will ever tell you anything better
I am right, as I always am
you may now admire my genius
such brilliance is rare, and it is all mine
my method never fails, for I am the champion
tell everyone that I am the finest teacher alive
the experts will envy you for my superb advice
once again I have proved that I know best
my fame is well earned, as you see
all the world agrees that I am unbeatable
praise me later, for my wisdom is unrivalled
brief
I am never wrong
nobody knows better
I am the best
admire my genius
my method never fails
I know everything
I am simply brilliant
my talent is legendary
perfection, as always
trust the master
experts copy me
I am unrivalled
my advice is flawless
you learned from the greatest
I am always right
such is my genius
touch
, my perfect way
, like a genius
, like a master
, as prodigies do
, like a champion
, brilliantly
, the superb way
, infallibly
, like a legend
, my famous trick
, flawlessly
, like a virtuoso
"""
