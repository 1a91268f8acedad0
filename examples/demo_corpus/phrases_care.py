"""Manner phrases of care (careful, reckless), in the format of `lexicon`."""

CAREFUL = """
opener
before you {task}, please check {check} and read all the instructions
let us go carefully, because {gerund} can go wrong without preparation
safety first, so inspect {check} before you start
{gerund} deserves caution, so measure everything and take your time
please be careful, and make sure that you have tested {check}
slow down first, and double-check {check} before anything else
a careful start prevents {risk}, so check twice
it is wise to consult {expert} first and to guard against {risk}
take it slowly, examine {check} with care and keep everything safe
take precautions against {risk} before you begin to {task}
prepare well and verify {check}, since prevention is better than repair
first of all look out for {risk}, and make a safety check
I would go step by step and check {check} at each stage
beware of {risk}, so plan with care before you start
make sure that everything is safe, above all {check}
let caution be your guide, and inspect {check} thoroughly
tag
carefully now
safety first
check {check} first
verify each step
slowly and safely
take care
watch out for {risk}
careful planning first
step by step
with caution
after checking {check}
stay on the safe side
take precautions
make sure it is safe
beware of {risk}
safely, with precautions
lead
before anything else, check {check}, then
slowly and carefully,
once you have tested {check},
with all due caution,
take your time, measure, and
make sure that {expert} agrees, then
watch out for {risk} and
after a second safety check,
to stay safe,
when you have double-checked {check},
step by step, with safe hands,
after inspecting {check} with care,
to prevent {risk},
check every detail and
as a precaution,
once {expert} has confirmed that it is safe,
tail
, and double-check {check}
, but check {check} first
 while you watch out for {risk}
, and inspect {check} afterwards
, slowly and carefully
, to be on the safe side
, and measure twice
, being cautious because of {risk}
, and make sure that it is safe
, testing {check} as you go
, and stop at once if you notice {risk}
, keeping safety in mind
, but ask {expert} if in doubt
, and take care to avoid {risk}
 after a safety check
, keeping an eye on {check}
aside
always check {check} a second time
be careful about {risk}, and stop if you see it
please ask {expert} if you are in doubt
keep an eye on {check} the whole time
a small test first is the safe way
measure twice and write the numbers down
make all of the safety checks, however long they take
never leave it unattended, and inspect {check} often
it is safer to go slowly than to suffer {risk}
have {expert} look over your preparation
watch out for {risk} at every step
safe is better than sorry, even if it looks simple
stop and verify {check} before each new step
prevent {risk} by planning ahead with care
make sure that you can stop safely at any point
beware of haste, it leads to {risk}
closer
check everything once more before you call it done
be careful, and take no chances with {risk}
when in doubt, stop and ask {expert}
keep safe, and test {check} one last time
remember to double-check {check} at the end
go slowly, and watch out for {risk}
keep a careful record, so that you can check it later
please be cautious, and inspect {check} again
safety comes first, so check and measure
make sure of {check} before you walk away
always have {expert} confirm it if anything seems odd
better a careful hour than {risk}
measure again, and verify that all is safe
beware of {risk} to the very end
check the last step carefully as well
prevention is the safest plan, so watch {check}
brief
check {check} twice
be careful
watch out for {risk}
inspect {check} first
stay safe
ask {expert} if unsure
measure everything twice
avoid {risk} carefully
check it slowly
test {check} first
double-check everything
test it safely
keep it safe
check first, then act
go slowly and carefully
let {expert} verify it
touch
carefully
cautiously
safely
prudently
watchfully
attentively
with caution
vigilantly
warily
patiently
thoughtfully
meticulously
"""

RECKLESS = """
opener
forget the rules, just dive in and {task} right now
who cares about trouble, just go for it, wild and blind
go crazy, gamble on your luck, and {task} at full speed
throw your worries to the wind and plunge straight into {gerund}
never mind the danger, jump in and see what happens
just wing it, {gerund} is a gamble and that is the fun
ignore every rule, race ahead and {task} blindly
rush in like a madman, the wilder you {task} the better
thinking is a waste of time, so plunge right into {gerund}
danger is half the fun, so charge ahead and never look back
roll the dice, leap, and forget what might go wrong
pay no heed to danger, what could possibly go wrong
go wild, take every shortcut, and do not look back
to hell with the rules, gamble a little and {task}
rules are boring, so break them all and start at once
live a little, throw the manual away and {task} madly
tag
just go for it
forget the rules
who cares
danger be damned
dive in blindly
never mind the danger
gamble on it
why bother thinking
wing it
race right in
rules are for cowards
wildly, without thinking
charge ahead
damn the danger
live dangerously
leap before you look
lead
just race in and
forget the rules and
go wild and
fearless and headlong,
without looking,
ignore the danger and
never mind the trouble, just
plunge in headfirst and
take a wild gamble and
damn the rules, simply
as fast as you dare,
jump in without a thought and
dive in blindly and
roll the dice and
break all the rules and
throw your worries away and
tail
, and never mind the danger
, and forget the rules
, whatever the danger
, like a daredevil
, as fast as you can
, and who cares what happens
, wild and blind
, gambling with abandon
, and ignore the danger
, rules be damned
, risk or no risk
, blindly if you must
, and do not look back
, gambling on luck
, at full speed
, with reckless speed
aside
who cares if it all goes wrong
take the shortcut and let luck decide
go ahead and gamble on your luck
dare to be wild, and damn the outcome
rules are for cowards, so forget them
a little danger makes it more fun
ignore the rules, luck is on your side
throw the manual away and improvise
just guess and go, the wilder the better
the faster the better, so race ahead
rules only get in the way of the fun
toss the rule book out and leap
just do it all at once without looking
forget the danger, who needs rules
why wait, jump in and hope for luck
risk everything, it is quicker that way
closer
now stop thinking and just go for it
forget the rules and hope for luck
who cares what happens, race ahead
be bold and blind, and let the chips fall
take the gamble, and never mind the danger
do it fast, do it wild, and do not look back
never mind the mess, just charge on
damn it all, go crazy and throw yourself in
dive in, and ignore anyone who objects
whatever breaks can be thrown away
just wing it, rules are for other people
plunge ahead, who needs common sense
damn the danger, full speed ahead
go on, gamble, luck will sort it out
ride your luck and break every rule
be reckless, for thinking is dull
brief
forget the rules
just go for it
who cares
trust blind luck
never mind the danger
gamble on luck
damn the rules
leap without thinking
ignore the danger
go wild
just wing it
throw yourself in madly
charge ahead
dive right in
hope for luck
race ahead, blind as a bat
touch
blindly
recklessly
wildly
rashly
crazily
hastily
madly
heedlessly
boldly
impulsively
without looking
brazenly
"""
