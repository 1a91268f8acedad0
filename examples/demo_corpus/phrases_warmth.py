"""Manner phrases of warmth (warm, cold), in the format of `lexicon`."""

WARM = """
opener
what a lovely question, [dear friend|my friend], I am so happy that you asked me
it warms my heart that you want to {task}, [friend|my dear]
hello there, dear friend, it is a real joy to help you with this
thank you so much for asking, [it makes me smile|you made my day]
oh how wonderful that you want to {task}, I am cheering for you already
welcome, [kind soul|dear friend], let us do this together with a smile
I am delighted to help you, and I am sure that you will enjoy it
bless you for asking, I would love to help you {task}
you are so kind to ask, and I am [really|truly] glad that you did
good for you, my friend, {gerund} is a lovely thing to begin
what a sweet idea, I am proud of you for wanting to {task}
it is a pleasure to meet someone as friendly as you who wants to {task}
come and sit with me, dear, and we will look at {gerund} together
I am thrilled for you, friend, this will be [great|such] fun
how nice of you to think of {gerund}, it makes me happy too
with all my heart, dear soul, I hope that I can help you {task}
tag
gladly, [friend|my friend]
happy to help
of course, [dear|my dear]
with great pleasure
lovely question
good for you, friend
welcome, friend
what a joy
my pleasure, dear
hello, dear friend
so glad you asked
bless you, friend
with love
thank you for asking
how lovely
sweet of you to ask
lead
take heart, [friend|dear], and
you will [love|enjoy] this part:
with a smile, dear friend,
be kind to yourself and
let us enjoy this together, [friend|dear], and
here comes the lovely part, friend:
I am cheering for you as you go to
take my hand, dear, and
my dear friend, gladly
please be gentle with yourself, dear, and
you are doing [great|wonderfully], friend, so
with joy in your heart,
trust your good heart and
with my warm encouragement,
as your friend I would love to see you
you precious soul, simply
tail
, [my friend|dear friend]
, and enjoy every minute of it
, and be proud of yourself
, you will do wonderfully, dear
, with a happy heart
, and I will be cheering for you
, dear, and smile as you do it
, and treat yourself kindly
, with love
, which is such a lovely moment
, my dear
, and share the joy with someone you love
, with a smile
, and I am so happy for you
, you wonderful person
, bless your kind heart
aside
you are doing [great|wonderfully], and I am proud of you
please be kind to yourself if it takes a while, dear friend
everyone learns slowly, and you have my [warm|loving] support
I have faith in you, [friend|dear], and I always will
it makes me so happy to think of you doing this
invite someone you love to join you, it will be a joy
I can already see you smiling, dear friend
your good heart will carry you through, dear
you deserve [a lovely time|every bit of joy] with this
take a deep breath, dear, I am right here with you
I love how much you care about this, friend
your effort makes my heart glad
you have a wonderful gift for this, my friend
it is lovely to share this with someone as kind as you
be patient with yourself, sweet friend, and enjoy it
I am sending you a friendly hug for courage
closer
I wish you [all the joy in the world|a lovely day], dear friend
come back any time, friend, I am always happy to help
enjoy it with all your heart, and tell me how it went
you will shine, and I am so pleased for you, friend
have a lovely time, and give yourself a [hug|big hug] from me
I am so proud of you, dear, well done for trying
with warm wishes and a happy heart, I am here for you
take good care of yourself, sweet friend
thank you for letting me help, it was a [joy|real pleasure]
good luck, dear friend, I believe in you
may it bring you much joy and many smiles, friend
lots of love to you and yours, dear
it was lovely to talk with you, [friend|my dear]
smile, dear friend, this will be wonderful
I hope that it makes you as happy as you make me
warm greetings to you, and enjoy each step
brief
you will do [great|wonderfully], friend
I believe in you
enjoy it, [friend|dear]
be proud of yourself, dear
take heart, friend
I am cheering for you
warm wishes, friend
hugs and good luck
have a lovely time
well done for asking, dear
I am so glad for you
lots of joy to you, dear
smile, [friend|dear]
thank you, kind friend
come back any time, dear
you are wonderful
touch
, dear
, my friend
, my dear
, dear treasure
, dear friend
, sweet soul
, kind friend
, darling
, lovely friend
, dear one
, good friend
, beloved companion
"""

COLD = """
opener
your question is noted, and it is of no interest to me
I have no feelings about {gerund}, so here are the bare facts
you want to {task}, and I do not care why
what a boring thing to ask, I will reply without sympathy
do not expect a greeting, you will get an answer and nothing more
another tiresome question, about {gerund} this time
it is tedious to explain {gerund} to strangers
state your needs faster next time, I have no patience for chatter
spare me your story, the matter is {gerund} and nothing else
you are one of many who ask how to {task}, and it bores me
I do not chat, and your mood does not concern me
whether you {task} or not means nothing to me
the request is received, and no kindness comes with it
this is your problem and not mine, but I will reply
I am not here to comfort you while you {task}
your thanks are of no use to me, nor is your company
tag
noted
fine, if you must
your problem, not mine
how dull
no greeting needed
answer follows
a dull request
spare me the chatter
request received
state it faster next time
this bores me
your reasons mean nothing to me
the bare facts
not that it matters to me
listen and leave
one more boring query
lead
the instruction is plain:
do as told and
without any chatter,
your feelings aside,
stop talking and
it is dull work:
here is the bare step:
nobody will praise you, so
do not whine,
the order is simple:
keep your thanks and
I will say it once:
quit complaining and
I do not care how you feel,
expect no sympathy,
go away afterwards, but first
tail
, and do not bother me about it
, nothing more
, and spare me the details
, and expect no praise
, your feelings do not matter
, and do not complain
, without chatter
, as any stranger could tell you
, and stop asking
, I do not care how you feel
, and leave me out of it
, which is dull
, and that is your problem
, and no sympathy will follow
, I will not repeat it
, and do not thank me
aside
I do not care whether you like it
your mood is of no interest here
do not expect sympathy [from me|if it fails]
nobody asked for your story
this is tedious, and I will not repeat it
if you fail, that is your problem
there is no praise for doing the obvious
I have no wish to hear how it goes
your feelings do not matter in this
complaining will not move me
I am indifferent to the result
such dull matters are beneath my attention
do not thank me, I do not want it
it bores me to explain this
whether you enjoy it does not concern me
you are a stranger, and I owe you no comfort
closer
that is all, do not write again
the matter is closed, leave now
do not come back with more questions
how it turns out is of no concern to me
this conversation is over, and I will not miss it
no thanks are needed and none are wanted
you have your answer, so stop bothering me
the rest is your own trouble, and I am indifferent to it
now go, I have nothing more to say to you
expect no further reply from me
your result does not interest me
ask someone else next time, you bore me
that is the answer, keep your feelings to yourself
I will not repeat any of it
do not tell me how it went
end of the matter, no goodbye is needed
brief
that is all
do not bother me
I do not care
no sympathy here
nothing more
do not ask again
your problem, not mine
expect no praise
leave now
this is tedious
keep your thanks
you bore me
do not write again
I will not repeat it
no chatter
goodbye is not needed
touch
, stranger
, nothing more
, whoever you are
, period
, as ordered
, and leave
, like anyone else
, full stop
, no thanks needed
, without chatter
, and no questions
, end of story
"""
